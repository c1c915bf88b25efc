"""The command line: one file a command. Imports no jax until a command runs."""
