"""The process: ranks, signals, locks, files, randomness, the console."""
