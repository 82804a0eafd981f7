"""Reading arrays from a `.npz` archive that may be damaged or hostile, in bounded time and memory.

NumPy does the reading. Before it may allocate, the sizes that the archive and the array's header declare are compared
with each other and with the file: a header of a few bytes can ask for terabytes, and so can a well-made zip.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays.place import Array
from ._checks import DataError, listed, refusal

HEADER_BYTES = 16_384
"""The part of a member in which its header must end; NumPy itself stops at 10,000."""
LIST_BYTES = 2**20
"""What the list of an archive's members may take: that of some 10,000 arrays. It is taken apart in Python."""
SMALL_BYTES = 8 * 2**20
"""What arrays may take together in any case, with 8 bytes for each number: what bytes become when they are class ids."""
MAX_RATIO = 100
"""Arrays that take more and shrank more than this are taken for a zip bomb (zeros shrink 1,000 times)."""


OTHER_NAMES = {"X": "data", "y": "target"}
"""What arrays may be called too, as scikit-learn's data sets call them."""


def read_npz(path: Path, names: tuple[str, ...]) -> list[Array]:
    """The arrays called `names`, numbers or text (`U`) of any shape; `DataError` if one of them cannot be had."""
    try:
        with _Listed(path) as file, zipfile.ZipFile(file) as archive:
            file.most = None
            names = tuple(_there(archive, name) for name in names)
            sizes = [_checked(path, archive, name) for name in names]
            taken, declared, packed = map(sum, zip(*sizes, strict=True))
            packed = min(packed, path.stat().st_size)
            if taken > SMALL_BYTES and declared > MAX_RATIO * packed:
                raise refusal(
                    path,
                    f"{' and '.join(names)} would unpack {packed} bytes to {declared}, as a zip bomb does; "
                    "if it is meant, write it uncompressed with numpy.savez",
                )
            return [_member(path, archive, name) for name in names]
    except DataError:
        raise
    except MemoryError as error:
        raise refusal(path, "does not fit in memory; use fewer samples or a smaller dtype") from error
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds on damaged bytes
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise refusal(path, f"is damaged or no .npz file ({reason}); write it again with numpy.savez") from error


class _Listed(io.BufferedReader):
    """A file of which no more than `most` bytes are read at once, while the list of an archive's members is."""

    most: int | None = LIST_BYTES

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        if self.most is not None:
            left = os.fstat(self.fileno()).st_size - self.tell()
            if (left if size is None or size < 0 else min(left, size)) > self.most:
                raise ValueError("the list of its members is as long as that of 10,000 arrays")
        return super().read(size)


def _there(archive: zipfile.ZipFile, name: str) -> str:
    """The name itself, or the other one that the array has."""
    other, members = OTHER_NAMES.get(name, name), archive.namelist()
    return other if f"{name}.npy" not in members and f"{other}.npy" in members else name


def _checked(path: Path, archive: zipfile.ZipFile, name: str) -> tuple[int, int, int]:
    """How many bytes an array will take, is declared to have, and has in the archive; `DataError` if it may not be read."""
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        has = listed(member.removesuffix(".npy") for member in archive.namelist())
        raise refusal(path, f"has no array {name!r} (it has {has}); write it with numpy.savez(path, X=X, y=y)") from None
    # zipfile bounds what it unpacks at a time for these two methods only, and NumPy writes no other.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise refusal(path, f"array {name!r} is packed by a method that NumPy does not write; use numpy.savez")
    with archive.open(info) as member:
        head = io.BytesIO(member.read(HEADER_BYTES))
    shape, dtype = _header(head)
    if dtype.kind not in "biufU":
        kind = "Python objects, which are never loaded (they can run code)" if dtype.hasobject else f"dtype {dtype}"[:60]
        how = f"save numbers as {name}.astype('float32')"
        if name not in ("X", OTHER_NAMES["X"]):
            how += f", and labels that are text as {name}.astype(str)"
        raise refusal(path, f"array {name!r} holds {kind}; {how}")
    declared = math.prod(shape) * dtype.itemsize
    if declared != info.file_size - head.tell():
        raise refusal(
            path,
            f"array {name!r} declares shape {str(shape)[:60]} of {dtype} but holds {info.file_size - head.tell()} bytes; "
            "write it again with numpy.savez",
        )
    return math.prod(shape) * max(8, dtype.itemsize), declared, info.compress_size


def _member(path: Path, archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(f"{name}.npy") as member:
        array = np.lib.format.read_array(member, allow_pickle=False)
    if array.dtype.kind == "U":  # NumPy takes any 32 bits for a character, and fails when one is used
        characters = np.ascontiguousarray(array).view(f"{array.dtype.str[0]}u4")
        if ((characters > 0x10FFFF) | (characters >> 11 == 0xD800 >> 11)).any():
            raise refusal(path, f"array {name!r} holds text that is no Unicode; write it again with numpy.savez")
    return array


def _header(head: io.BytesIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype from the start of a `.npy` file; leaves `head` at the array's first byte."""
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"a .npy header of version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(head)
    return shape, dtype
