"""Many runs of one base recipe: the file, keys, state, processes and results of a sweep."""
