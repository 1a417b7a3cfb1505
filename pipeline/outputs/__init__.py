"""What runs leave and where: places, the record beside every output, what was made for a recipe."""
