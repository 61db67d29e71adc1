"""Configuration space, decoded with bounds checks."""
