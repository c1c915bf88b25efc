"""From a coupling to merged weights."""
