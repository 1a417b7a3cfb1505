"""What a plan is made of: a trial at a small scale, targets compared, what fits a budget."""
