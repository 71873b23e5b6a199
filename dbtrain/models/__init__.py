"""Base models: loading, sampling, objectives, precision."""
