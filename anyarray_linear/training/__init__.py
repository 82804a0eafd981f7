"""Training: `fit`, `evaluate`, `predict`, and what they are made of."""

from .callbacks import EarlyStopping
from .evaluation import evaluate, predict
from .fitting import fit
from .history import History, NonFiniteError

__all__ = ["EarlyStopping", "History", "NonFiniteError", "evaluate", "fit", "predict"]
