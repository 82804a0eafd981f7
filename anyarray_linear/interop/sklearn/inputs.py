"""What users of scikit-learn hand over, as arrays: labels of any kind, and weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import Any

import numpy as np
from sklearn.utils import check_array
from sklearn.utils.class_weight import compute_sample_weight

from ...arrays.device import Device
from ...arrays.place import Array, is_array

Host = np.ndarray[Any, Any]


def where(X: Any) -> AbstractContextManager[Any]:
    """A context in which scikit-learn computes where `X` is; with CuPy arrays, it does so on the current device."""
    return Device.of(X) if is_array(X) else nullcontext()


def on_host(y: Any) -> Host:
    """Labels or targets of any kind on the host."""
    return Device.of(y).to_numpy(y) if is_array(y) else np.asarray(y)


def is_text(labels: Array) -> bool:
    """Whether the labels are something that only NumPy has arrays of."""
    return isinstance(labels, np.ndarray) and labels.dtype.kind not in "biuf"


def weights_of(sample_weight: Any, class_weight: Any, y: Host) -> Host | None:
    """A float64 weight per sample, the product of both; `None` where neither is given.

    class_weight: as `sklearn.utils.class_weight.compute_sample_weight` takes it.

    Raises `ValueError` for weights that are not one finite number >= 0 per sample, or that are all 0.
    """
    if sample_weight is None and class_weight is None:
        return None
    weights = np.ones(len(y))
    if class_weight is not None:
        weights = weights * compute_sample_weight(class_weight, y)
    if isinstance(sample_weight, Real):
        weights = weights * float(sample_weight)
    elif sample_weight is not None:
        given = on_host(sample_weight) if is_array(sample_weight) else sample_weight
        given = check_array(given, ensure_2d=False, dtype=np.float64, input_name="sample_weight")
        if given.shape != weights.shape:
            raise ValueError(f"sample_weight has shape {given.shape}, but there are {len(y)} samples; give {weights.shape}")
        weights = weights * given
    if (weights < 0).any():
        raise ValueError(f"sample_weight or class_weight makes a weight of {weights.min()}; weights must be >= 0")
    if not weights.any():
        raise ValueError("sample_weight or class_weight makes every weight zero, so there is nothing to learn from")
    return weights
