"""From a data section to documents and their tokens: sources, what is wrong with their files, tokenising."""
