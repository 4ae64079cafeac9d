"""Measurements; see scripts/bench.py."""
