"""The recipe: its sections, its defaults, and the file that it is read from. Imports no torch."""
