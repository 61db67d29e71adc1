"""What can be done to a host, one file a facility."""
