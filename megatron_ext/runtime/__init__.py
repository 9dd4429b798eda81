"""Machine and processes: what kernels there are, CPU stand-ins for megatron's CUDA assumptions, process groups."""
