"""Backends that run a plan."""
