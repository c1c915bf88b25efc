"""What a user may ask, as checked models."""
