"""Who uses a device, and whether it can be passed through."""
