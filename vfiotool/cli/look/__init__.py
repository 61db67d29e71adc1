"""Commands that look at a host."""
