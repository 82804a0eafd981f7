"""Models and checkpoints in files, written so that no crash leaves a half of one."""

from .checkpoints import load_checkpoint, save_checkpoint
from .models import load_model, save_model
from .sealed import CheckpointError

__all__ = ["CheckpointError", "load_checkpoint", "load_model", "save_checkpoint", "save_model"]
