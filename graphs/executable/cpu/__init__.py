"""Interprets plans on the CPU, with PyTorch."""
