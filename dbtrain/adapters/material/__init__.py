"""Adapters as material: looked into, added, resized, compared, extracted, and merged into a base."""
