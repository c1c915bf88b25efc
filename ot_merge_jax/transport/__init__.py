"""Entropic optimal transport between neurons and layers. Imports neither models, io nor flax."""
