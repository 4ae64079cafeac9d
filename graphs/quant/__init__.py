"""Quantization: rewrites that change numbers, kept apart from those that do not (graphs/passes/)."""
