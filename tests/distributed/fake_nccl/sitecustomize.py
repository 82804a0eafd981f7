"""A FAKE of NCCL for the CPU stand-in for CUDA, put in place where this folder is on the path: no part of NCCL runs.

CuPy's own process group and its store run as they are. What stands for the library checks what it is handed, and sums on the
host by files in the folder `FAKE_NCCL`. As the real one, it waits for ever for a rank that does not come.
"""

import itertools
import os
import time
from pathlib import Path

import numpy as np

DTYPES = {"e": np.float16, "f": np.float32, "d": np.float64, "l": np.int64, "B": np.uint8}
ORDER = list(DTYPES)


class Communicator:
    def __init__(self, ranks, unique_id, rank):
        import cupy

        assert unique_id == b"fake", "that of rank 0, by the store"
        self.ranks, self.rank, self.folder = ranks, rank, Path(os.environ["FAKE_NCCL"])
        self.device = cupy.cuda.Device().id
        (self.folder / f"rank{rank}.device").write_text(str(self.device))
        self.calls = itertools.count()

    def _everyone(self, pointer, count, kind, stream):
        """What all ranks hand to this call."""
        import cupy

        assert cupy.cuda.Device().id == self.device
        cupy.cuda.runtime.streamSynchronize(stream)
        mine, call = self._at(pointer, count, kind).get(), next(self.calls)
        if call == 50 and os.environ.get("FAKE_FAULT") == str(self.rank):
            raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR: the card has fallen off")
        part = self.folder / f"{self.rank}.part"
        with part.open("wb") as file:
            np.save(file, mine)
        part.rename(self.folder / f"{call}.{self.rank}.npy")
        found = []
        for rank in range(self.ranks):
            path = self.folder / f"{call}.{rank}.npy"
            while not path.exists():
                time.sleep(0.001)
            found.append(np.load(path))
            assert found[-1].dtype == mine.dtype
            assert found[-1].shape == mine.shape
        old = self.folder / f"{call - 2}.{self.rank}.npy"  # all have begun the one after it, and so read it
        old.unlink(missing_ok=True)
        return found

    def _at(self, pointer, count, kind):
        import cupy

        dtype = np.dtype(DTYPES[ORDER[kind]])
        memory = cupy.cuda.UnownedMemory(pointer, count * dtype.itemsize, self)
        return cupy.ndarray((count,), dtype, cupy.cuda.MemoryPointer(memory, 0))

    def allReduce(self, source, target, count, kind, operation, stream):
        assert operation == 0
        total = sum(x.astype(np.float64) for x in self._everyone(source, count, kind, stream))
        self._at(target, count, kind).set(total.astype(DTYPES[ORDER[kind]]))

    def allGather(self, source, target, count, kind, stream):
        everyone = np.concatenate(self._everyone(source, count, kind, stream))
        self._at(target, everyone.size, kind).set(everyone)



if "FAKE_NCCL" in os.environ:
    from cupy.cuda import nccl

    nccl.available = True
    nccl.get_unique_id = lambda: b"fake"
    nccl.NcclCommunicator = Communicator
    names = ["INT8", "UINT8", "INT32", "UINT32", "INT64", "UINT64", "FLOAT16", "FLOAT32", "FLOAT64"]
    for name in names:
        char = {"UINT8": "B", "INT64": "l", "FLOAT16": "e", "FLOAT32": "f", "FLOAT64": "d"}.get(name)
        setattr(nccl, f"NCCL_{name}", -1 if char is None else ORDER.index(char))
    nccl.NCCL_SUM, nccl.NCCL_PROD, nccl.NCCL_MAX, nccl.NCCL_MIN = range(4)
