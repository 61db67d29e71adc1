"""A host in a file."""
