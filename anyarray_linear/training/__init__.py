"""Training: `fit`, `evaluate`, `predict`, and what they are made of."""

from .evaluation import evaluate, predict
from .fitting import fit
from .history import History, NonFiniteError

__all__ = ["History", "NonFiniteError", "evaluate", "fit", "predict"]
