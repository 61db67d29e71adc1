"""From facts and a wish to steps."""
