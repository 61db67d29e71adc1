"""Commands that change a host."""
