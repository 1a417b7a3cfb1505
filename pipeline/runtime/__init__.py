"""What every part stands on: interruptions and endings, files that appear whole, units, memory."""
