"""Commands that drive a device from user space."""
