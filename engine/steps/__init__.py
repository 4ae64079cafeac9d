"""Kinds of step, one file each: how a batch is staged and its results taken in. The twins of graphs/steps."""
