"""The row step on a C kernel, for CPUs."""
