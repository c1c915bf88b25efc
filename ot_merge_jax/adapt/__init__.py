"""Training: objectives and the optax loop."""
