"""A linear layer with a hand-derived backward pass, written once against the Array API standard.

The same lines run on NumPy arrays on a CPU, on CuPy arrays on a CUDA GPU, and on any other array of the standard. Around the
layer: activations, a container that catches the caches, losses, optimizers, a training loop and a device-selection helper.
"""

from . import lanes
from .activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from .arrays.device import Device
from .arrays.selection import DeviceUnavailableError, select_device
from .binary import BinaryCrossEntropy
from .dropout import Dropout
from .files import CheckpointError, load_checkpoint, load_model, save_checkpoint, save_model
from .linear import Linear, LinearGradients, linear_backward, linear_forward
from .losses import Loss, MeanSquaredError, SoftmaxCrossEntropy, softmax
from .normalization import LayerNorm
from .optimizers import SGD, Adam, AdamW
from .protocol import Layer, Optimizer, restore, snapshot
from .scaling import LossScale
from .sequential import Sequential
from .step import TrainingStep
from .training import EarlyStopping, History, NonFiniteError, evaluate, fit, predict

__version__ = "0.1.0"

__all__ = [
    "GELU",
    "SGD",
    "Adam",
    "AdamW",
    "BinaryCrossEntropy",
    "CheckpointError",
    "Device",
    "DeviceUnavailableError",
    "Dropout",
    "EarlyStopping",
    "History",
    "Layer",
    "LayerNorm",
    "Linear",
    "LinearGradients",
    "Loss",
    "LossScale",
    "MeanSquaredError",
    "NonFiniteError",
    "Optimizer",
    "ReLU",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SoftmaxCrossEntropy",
    "Tanh",
    "TrainingStep",
    "evaluate",
    "fit",
    "lanes",
    "linear_backward",
    "linear_forward",
    "load_checkpoint",
    "load_model",
    "predict",
    "restore",
    "save_checkpoint",
    "save_model",
    "select_device",
    "snapshot",
    "softmax",
]
