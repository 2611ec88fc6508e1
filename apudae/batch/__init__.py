"""The command line and everything that runs notebooks in bulk."""
