"""Many subjects at once on one resident base."""
