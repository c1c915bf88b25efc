"""Adaptation: a merge trained with its residual frozen, or any model trained."""
