"""How good a student is: held-out text, tasks, the similarity of blocks, and what to try next."""
