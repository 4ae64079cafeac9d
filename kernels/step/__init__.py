"""Ops that say where a step stands in its sequences."""
