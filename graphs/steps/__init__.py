"""Kinds of step, one file each: what a step stages, runs and reports. See base.py."""
