"""A recipe's output folder, and what is published and found by a recipe."""
