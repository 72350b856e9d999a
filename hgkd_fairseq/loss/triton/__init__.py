"""The row step on Triton kernels, for GPUs."""
