"""Whole runs: folders and texts in, one published folder out."""
