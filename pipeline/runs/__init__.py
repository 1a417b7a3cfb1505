"""A recipe's output folder: what is kept there, what it says of the trained student, and its card."""
