"""Training: `fit`, `evaluate`, `predict`, and what they are made of."""

from .fitting import History, NonFiniteError, evaluate, fit, predict

__all__ = ["History", "NonFiniteError", "evaluate", "fit", "predict"]
