"""The rows of a chunk in C, for the CPU."""
