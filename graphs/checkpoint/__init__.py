"""Readers of checkpoints: Hugging Face folders, GGUF files, dummy weights."""
