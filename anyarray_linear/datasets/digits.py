"""The handwritten digits that come with the package.

1,797 images of 8x8 pixels, each the number (0 to 16) of set pixels in a 4x4 block of a 32x32 scan: the test part of

    E. Alpaydin and C. Kaynak (1998). Optical Recognition of Handwritten Digits. UCI Machine Learning Repository.
    https://doi.org/10.24432/C50P49. Licensed CC BY 4.0, https://creativecommons.org/licenses/by/4.0/.

The file keeps every value; only its format is new. `make_digits.py` is the script that wrote it.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np

from ..arrays.place import Array


def load_digits() -> tuple[Array, Array]:
    """The handwritten digits, by E. Alpaydin and C. Kaynak (1998; see this module's first lines).

    Returns:
        `X`, float32 `(1797, 64)`: a row is an image, row by row, scaled to [0, 1] (0 is paper, 1 is ink).
        `y`, int64 `(1797,)`: the digit, 0 to 9.

    >>> X, y = load_digits()
    >>> X.shape, str(X.dtype), y[:5].tolist()
    ((1797, 64), 'float32', [0, 1, 2, 3, 4])
    """
    with files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as data:
        return data["X"].astype(np.float32) / 16, data["y"].astype(np.int64)
