"""Handing devices to virtual machines: is it ready, and what does each hypervisor want to read."""
