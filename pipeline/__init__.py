"""The two stages over the store, and what they are made of: data, models, targets, losses, training."""
