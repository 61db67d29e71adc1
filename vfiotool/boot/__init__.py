"""A policy applied at every boot."""
