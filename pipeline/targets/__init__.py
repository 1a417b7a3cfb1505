"""What is stored of a teacher: columns, their encodings, and how they are read back."""
