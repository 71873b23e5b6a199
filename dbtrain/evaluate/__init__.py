"""How well a run learnt its subject, and what it forgot."""
