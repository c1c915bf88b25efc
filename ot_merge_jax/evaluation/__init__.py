"""Losses, likelihoods, samples, tasks, and the statistics of their differences."""
