"""The command line: the one place where the two columns of the house meet."""
