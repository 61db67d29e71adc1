"""What a host has, as frozen values."""
