"""Images with one or more adapters."""
