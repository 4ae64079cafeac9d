"""Attention and KV-cache contracts."""
