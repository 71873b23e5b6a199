"""The process: ranks, signals, locks, files, random numbers, the console."""
