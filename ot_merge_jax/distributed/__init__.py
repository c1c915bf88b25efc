"""Devices: where arrays live."""
