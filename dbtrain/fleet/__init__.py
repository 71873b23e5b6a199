"""Many subjects, each with an adapter of its own, on one base."""
