"""Photos of a subject in, a small adapter for a text-to-image diffusion model out."""

__version__ = "0.1.0"
