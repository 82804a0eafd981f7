"""Write `digits.npz` from the copy of the data in scikit-learn: `python -m anyarray_linear.datasets.make_digits`.

Running it again gives the same bytes (with the same zlib): the archive carries no time and no other outside state.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ABOUT = (
    "Optical Recognition of Handwritten Digits (test part), E. Alpaydin and C. Kaynak, 1998, "
    "UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0; stored as uint8"
)


def make(path: Path) -> None:
    """Write `X`, uint8 `(1797, 64)` of 0 to 16, `y`, uint8 `(1797,)` of 0 to 9, and the credit line `about`."""
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    X, y = data.astype(np.uint8), target.astype(np.uint8)
    if (data != X).any() or (target != y).any():
        raise ValueError("the digits of this scikit-learn are not whole numbers of a byte; use another version")
    np.savez_compressed(path, X=X, y=y, about=np.array(ABOUT))


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("digits.npz"))
