"""An NVMe driver in user space."""
