"""Models and checkpoints in files, written so that no crash leaves a half of one."""

from .checkpoints import CheckpointError, load_checkpoint, load_model, save_checkpoint, save_model

__all__ = ["CheckpointError", "load_checkpoint", "load_model", "save_checkpoint", "save_model"]
