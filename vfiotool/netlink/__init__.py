"""The wire formats: netlink messages, route and devlink attributes."""
