"""The decoder, its parameter table and its families. The only package that imports flax."""
