"""The command line: what commands share, commands by themselves, and results as lines and tables."""
