"""What a file system does not offer is done without, and said once: none of it may end a training."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = ("ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL", "ENOTTY")
NOT_OFFERED = frozenset(getattr(errno, name) for name in _NAMES if hasattr(errno, name))
"""The errors that say, of any call, that there is no such thing here."""

_said: set[tuple[str, str]] = set()


@contextmanager
def if_offered(path: str | os.PathLike[str], lost: str, *more: int) -> Iterator[None]:
    """A context for one call about `path` that may not be offered; then a `RuntimeWarning`, once, says what is `lost`.

    more: which errors of this call mean that it is not offered, beside `NOT_OFFERED`. Others are raised: a full or broken
    disk is no lack of an offer.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_OFFERED.union(more):
            raise
        if (os.fspath(path), lost) not in _said:
            _said.add((os.fspath(path), lost))
            warnings.warn(f"{os.fspath(path)}: {lost} ({error.strerror or error})", RuntimeWarning, stacklevel=4)
