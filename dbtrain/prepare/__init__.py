"""Photos and class images to shards."""
