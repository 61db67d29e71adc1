"""vfiotool: hand Linux devices to virtual machines and user-space drivers."""

__version__ = "0.1.0"
