"""Photos and shards on disk, batches in memory."""
