"""Merge language models across architectures with optimal transport, in JAX."""
