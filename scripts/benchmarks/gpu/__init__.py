"""Measurements on a GPU, and what runs single kernels for them and for tests/gpu."""
