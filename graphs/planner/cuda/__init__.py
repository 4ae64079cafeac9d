"""Planning for NVIDIA GPUs: kernels compiled ahead of time, and the nodes that launch them."""
