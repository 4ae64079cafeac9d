"""Readers of checkpoints: Hugging Face folders, GGUF files, dummy weights; numpy only."""

from makeready.graphs.checkpoint.base import Checkpoint, CheckpointError, TensorInfo, open_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "TensorInfo", "open_checkpoint"]
