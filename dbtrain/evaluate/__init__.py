"""How well a run learned its subject, and what it forgot."""
