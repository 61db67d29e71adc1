"""The machine: reading it, observing it, writing to it."""
