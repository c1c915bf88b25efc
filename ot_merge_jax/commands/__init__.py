"""The commands of `ot-merge`: flags in, a call, what it found out. No logic."""
