"""Runs plans on NVIDIA GPUs through the CUDA driver; imports neither torch nor triton."""
