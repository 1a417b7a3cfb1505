"""Students: cut from a teacher in depth and width, or designed for a size, and what is recorded of that."""
