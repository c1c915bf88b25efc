"""Training after a merge: losses, packing, the step, the loop."""
