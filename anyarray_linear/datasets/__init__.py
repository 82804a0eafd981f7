"""Data to train on: the digits that come with the package, and `.npz` and `.csv` files of your own.

Every file that is not fit for training is refused with a `DataError`, whose one line says which file, what was wrong
and where, and how to fix it. Nothing here needs more than NumPy.
"""

from ._checks import Data, DataError
from .digits import load_digits
from .files import Reading, load_data, load_features, read_data
from .splitting import split

__all__ = ["Data", "DataError", "Reading", "load_data", "load_digits", "load_features", "read_data", "split"]
