"""Photos to shards, and shards to batches."""
