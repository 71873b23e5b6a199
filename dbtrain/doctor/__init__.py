"""What would make a run fail, found before it is queued."""
