"""The rows of a chunk in Triton kernels, for a GPU."""
