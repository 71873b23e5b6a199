"""Adapter files, one module a format."""
