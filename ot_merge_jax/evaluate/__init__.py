"""Held-out loss of models, and how sure a difference is."""
