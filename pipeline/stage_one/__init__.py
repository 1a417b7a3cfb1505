"""What stage one is made of: requests, shards, calibrations, workers."""
