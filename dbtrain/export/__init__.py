"""Adapter files, their model card, and the Hub."""
