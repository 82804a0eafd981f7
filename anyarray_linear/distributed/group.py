"""Data-parallel training over several processes: `mpiexec -n P`, and `fit(..., group=mpi())` in each of them.

What it answers:

- *The same training.* Every rank draws the same order from one seed and works on its contiguous share of each global batch.
  The sum over the ranks of `rows_r / rows * gradient_r` is the gradient of the whole batch, also where shares are uneven or
  empty. Then every rank does the same step, so weights and optimizers stay equal; a checksum each epoch sees to it.
- *One message per step.* Loss, gradients and the wish to stop travel in one buffer, by one all-reduce.
- *The engine is somebody else's.* MPI through mpi4py carries all that is on the host; NCCL, through `cupyx.distributed`, the
  gradients of several GPUs. Neither is loaded before it is used.
- *Nobody waits for ever.* Whoever fails tells the others; all waiting looks for such news, and has an end. So every rank
  leaves with an error that names the rank it is about.
"""

from __future__ import annotations

import atexit
import math
import os
import pickle
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..arrays import doctor
from ..arrays.device import Device, select_device
from ..arrays.place import Array, computing_on, dtype_name
from ..protocol import join, leaves, parameters

_DIGESTED = 1 << 24  # numbers of the data at most that ranks compare
_GRACE = 5.0  # seconds in which the others must say so too
_yield = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has none


class RankError(RuntimeError):
    """Another rank failed, fell silent, or is not what the others are; the message names it.

    ranks: the numbers of the ranks that it is about.
    """

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks


class _Late(Exception):
    """Some rank has not come to what the others wait for."""


class Group:
    """The processes that train one model together, by their ranks; this one is a process alone. See `mpi` and `nccl`.

    Attributes:
        rank: the number of this process, from 0. Rank 0 alone prints and writes files.
        size: how many there are.
        local_rank: the number among those on this machine.
        echoes: whether this rank stopped with the very error of rank 0, which need not be told twice.
    """

    rank, size, local_rank, echoes = 0, 1, 0, False

    def device(self, spec: Any = "auto") -> Device:
        """The device of this rank, for `"auto"` or `"cuda"` one of its own; raises as `select_device` does."""
        return select_device(spec)

    @contextmanager
    def running(self) -> Iterator[None]:
        """What all ranks do together: if one leaves by an error, all do, and none leaves before the others are done."""
        yield

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This rank's part of the rows from `start` to `stop`: contiguous, and as large as the others' or one row less."""
        rows = stop - start
        return start + rows * self.rank // self.size, start + rows * (self.rank + 1) // self.size

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank."""
        return [value]

    def average(
        self, value: Array, gradients: dict[str, Array], wants_stop: bool
    ) -> tuple[Array, dict[str, Array], bool]:
        """Loss and gradients summed over the ranks, and whether any rank wants to stop.

        value: a 0-d array, the loss of this rank's rows times their part of the batch's. gradients: likewise, by name.
        What is returned holds until the next call.
        """
        return value, gradients, wants_stop

    def agree(self, mine: Mapping[str, Any]) -> None:
        """Raise `RankError` unless all ranks have the same values by these names."""
        everyone = self.exchange(dict(mine))
        for name, value in everyone[0].items():
            others = tuple(rank for rank, theirs in enumerate(everyone) if theirs[name] != value)
            if others:
                raise RankError(
                    f"{self._named(others[:1])} has {name} {everyone[others[0]][name]}, but rank 0 has {value}; "
                    "all ranks must train the same, so call fit with the same arguments, all of the data included",
                    others,
                )

    def claim(self, device: Device) -> None:
        """Raise `RankError` if another rank computes on the same CUDA device; warn of more BLAS threads than cores."""

    def check(self, digest: str, when: str) -> None:
        """Raise `RankError` on every rank unless all have this digest; named are those who are not with the majority."""
        everyone = self.exchange(digest)
        (most, count), *_ = Counter(everyone).most_common()
        if count == self.size:
            return
        others = tuple(rank for rank, theirs in enumerate(everyone) if theirs != most)
        who = self._named(others)
        if 2 * count <= self.size:  # nobody can tell who is right
            others, who = tuple(range(self.size)), "no majority of the ranks agrees, and rank 0 or " + who
        raise RankError(
            f"weights, optimizer or random state differ {when}: {who} {'has' if len(others) == 1 else 'have'} others than "
            "the rest. Something changed them on some ranks only, such as a callback, or a machine computes wrongly. "
            "The last checkpoint is from before that; resume from it",
            others,
        )

    def _named(self, ranks: tuple[int, ...]) -> str:
        return " and ".join(f"rank {rank}" for rank in ranks)

    def __str__(self) -> str:
        return "one process"


class _MPI(Group):
    """Ranks over mpi4py."""

    def __init__(self, comm: Any, timeout: float, half: bool, device_buffers: bool | None) -> None:
        import socket

        self.MPI = _mpi4py()
        self.base = (self.MPI.COMM_WORLD if comm is None else comm).Dup()
        self.timeout, self.half = float(timeout), bool(half)
        self.rank, self.size = self.base.rank, self.base.size
        here = self.base.Split_type(self.MPI.COMM_TYPE_SHARED)
        self.local_rank, self.seats = here.rank, here.allgather(_seat())
        self.device_buffers = self._takes_device_buffers() if device_buffers is None else bool(device_buffers)
        self.places = self.base.allgather((socket.gethostname(), os.getpid()))
        spaces = self.base.allgather((socket.gethostname(), _process_space()))
        self._seen = [rank for rank, space in enumerate(spaces) if space == spaces[self.rank] and space[1]]
        self._comm: Any = None  # of what is running now: what a failure leaves unfinished must not meet what comes later
        self._session = 0  # its number, and the tag of the messages about it
        self._joined = 0  # how many collective operations of it this rank has joined
        self._news: dict[int, tuple[int, tuple[int, ...], str]] = {}  # what ranks that stop have said
        self._kept: list[Any] = []  # messages on their way, and what was left unfinished
        self._staging: dict[tuple[int, str], Any] = {}
        self._said = self._warned = False

    def _takes_device_buffers(self) -> bool:
        """Whether this MPI says that it takes CUDA memory, as MPI 4.1 lets it, or `ANYARRAY_MPI_CUDA=1` says so for it."""
        kinds = self.MPI.COMM_WORLD.Get_info().Get("mpi_memory_alloc_kinds") or ""
        return "cuda" in kinds or os.environ.get("ANYARRAY_MPI_CUDA", "0") == "1"

    def device(self, spec: Any = "auto") -> Device:
        if spec == "auto":
            spec = os.environ.get("ANYARRAY_DEVICE") or ("cuda" if doctor.count() else "auto")
        # a launcher may let each rank see one card only, which is cuda:0 for all of them
        return select_device(f"cuda:{self.local_rank % max(1, doctor.count())}" if spec == "cuda" else spec)

    def claim(self, device: Device) -> None:
        if device.kind == "cpu":
            self._warn_of_threads()
        if device.kind != "cuda":
            return
        card = doctor.load_cupy().cuda.runtime.getDeviceProperties(device.index)["uuid"], device.native.pci_bus_id
        everyone = self.exchange((self.places[self.rank][0], card))
        both = tuple(rank for rank, theirs in enumerate(everyone) if theirs == everyone[self.rank])
        if len(both) > 1:
            raise RankError(
                f"{self._named(both)} have the same device, {device}; start no more ranks on a machine than it has devices, "
                "and let each choose its own: device=group.device()",
                both,
            )

    def _warn_of_threads(self) -> None:
        import warnings

        fitting = _fitting_threads(self.seats)
        if fitting is not None and self.rank == 0 and not self._warned:
            most = max(threads for _, threads in self.seats)
            warnings.warn(
                f"{len(self.seats)} ranks on this machine have up to {most} BLAS threads each, more than its cores, and "
                f"slow each other down; start them with OPENBLAS_NUM_THREADS={fitting}",
                stacklevel=2,
            )
        self._warned = True

    def __str__(self) -> str:
        where = ", ".join(f"{rank} is process {pid} on {host}" for rank, (host, pid) in enumerate(self.places))
        return f"{self.size} rank{'s' * (self.size > 1)} over {self._library()}: {where}"

    def _library(self) -> str:
        text = " ".join(self.MPI.Get_library_version().replace("Version:", " ").splitlines()[0].split())
        return text.partition(",")[0].rstrip("\0")

    def _named(self, ranks: tuple[int, ...]) -> str:
        return " and ".join("rank {} (process {} on {})".format(rank, *reversed(self.places[rank])) for rank in ranks)

    # -----------------------------------------------------------------------------------------------------------------
    # waiting, and what may be heard meanwhile

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._comm is not None:  # inside another one
            yield
            return
        self._session, self._joined = self._session + 1, 0
        try:
            self._comm, request = self.base.Idup()
            self._complete(request)
            yield
            self.exchange(None)
        except BaseException as error:
            silent = self._part(error)
            if isinstance(error, _Late):
                what = f"{self._named(silent)} gave no sign for {self.timeout:.0f} s"
                if not silent:
                    what = (
                        f"some rank was not ready within {self.timeout:.0f} s, and nobody can tell which, for by now all "
                        "answer; if one may take so long, for a callback or a checkpoint, give mpi(timeout=...) more seconds"
                    )
                raise RankError(what, silent) from None
            raise
        finally:
            self._comm = None
            self._news.clear()

    def _complete(self, request: Any, *buffers: Any) -> None:
        """Wait for a collective operation that this rank has just joined."""
        self._joined += 1
        try:
            self._wait(request.Test, self._joined)
        except BaseException:
            self._kept.append((request, buffers))  # MPI may still write to them, and mpi4py does not keep them
            self._staging.clear()
            raise

    def _wait(self, done: Callable[[], bool], number: int) -> None:
        """Wait until it is done. Raises `RankError` when another rank stops, and `_Late` after `timeout`.

        number: of the collective operation that is waited for. Whoever stops after having joined it holds up nobody here.
        """
        began = looked = time.monotonic()
        while not done():
            waited = time.monotonic() - began
            if waited < 0.002:
                _yield()  # with more ranks than cores, the one that is waited for may need this one
                continue
            self._hear()
            for joined, about, what in self._news.values():
                if not about:  # it has waited too long for what this one waits for
                    raise _Late
                if joined < number:
                    raise RankError(what, about)
            if began + waited > looked + 0.5:
                self._look(done)
                looked = time.monotonic()
            if waited > self.timeout:
                raise _Late
            time.sleep(0 if waited < 1 else 1e-3)

    def _hear(self) -> None:
        """Note what other ranks have said about why they stop."""
        status = self.MPI.Status()
        while self.base.Iprobe(tag=self._session, status=status):
            self._news[status.source] = self.base.recv(source=status.source, tag=self._session)

    def _look(self, done: Callable[[], bool]) -> None:
        """Raise `RankError` if a process on this machine is no more, and what it should have sent does not come."""
        for rank in self._seen:
            try:
                os.kill(self.places[rank][1], 0)
            except ProcessLookupError:
                time.sleep(0.2)
                if not done():
                    raise RankError(f"{self._named((rank,))} has died", (rank,)) from None
            except PermissionError:
                pass  # it is there, and somebody else's

    def _part(self, error: BaseException) -> tuple[int, ...]:
        """Tell the other ranks why this one stops, and wait a moment for them to say so too; those that did not."""
        about: tuple[int, ...] = (self.rank,)
        what = f"{self._named(about)} stopped: {type(error).__name__}: {error}"
        if isinstance(error, RankError):
            about, what = error.ranks, str(error)
        elif isinstance(error, _Late):
            about = ()
        others = set(range(self.size)) - {self.rank}
        until = time.monotonic() + _GRACE
        self._kept += [self.base.isend((self._joined, about, what), rank, self._session) for rank in others]
        while others - self._news.keys() and time.monotonic() < until:
            self._hear()
            time.sleep(1e-3)
        silent = tuple(sorted(others - self._news.keys()))
        ends_all = bool(silent) or self._unfinished()  # and so may cut rank 0 short
        theirs = self._news[0][2] if 0 in self._news else ""
        own, of_rank_0 = (text.partition(" stopped: ")[2] or text for text in (what, theirs))
        self.echoes = own == of_rank_0 and not ends_all
        if ends_all:
            atexit.register(self._abort)
        return silent

    def _unfinished(self) -> bool:
        """Whether something would keep this process from ending, such as a sum that some rank never joined."""
        return False

    def _abort(self) -> None:
        """End all ranks: MPI would wait for those that are silent."""
        self.base.Abort(1)

    def exchange(self, value: Any) -> list[Any]:
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self.size, np.int64)
        size = np.asarray([mine.size])
        self._complete(self._comm.Iallgather(size, sizes), size, sizes)
        everyone = np.empty(int(sizes.sum()), np.uint8)
        self._complete(self._comm.Iallgatherv(mine, [everyone, sizes]), mine, everyone, sizes)
        return [pickle.loads(part.tobytes()) for part in np.split(everyone, np.cumsum(sizes)[:-1])]

    # -----------------------------------------------------------------------------------------------------------------
    # the gradients

    def average(
        self, value: Array, gradients: dict[str, Array], wants_stop: bool
    ) -> tuple[Array, dict[str, Array], bool]:
        gradients = {name: gradients[name] for name in sorted(gradients)}  # in one order on all ranks
        first = next(iter(gradients.values()))
        with computing_on(first) as xp:
            packed = [xp.reshape(dW, (-1,)) for dW in gradients.values()]
            exact = xp.float32 if dtype_name(first.dtype) == "float16" else first.dtype  # a loss of 65505 is no infinity
            flag = xp.full((1,), float(wants_stop), dtype=exact, device=Device.of(first).native)
            tail = [xp.astype(xp.reshape(value, (1,)), exact, copy=False), flag]
            if self.half or exact != first.dtype:  # the loss keeps its precision, at the price of a second, small message
                flat, _ = self._summed(xp.astype(self._packed(xp, packed), xp.float16, copy=False), False)
                flat = xp.astype(flat, first.dtype, copy=False)
                last, stop = self._summed(xp.concat(tail), True)
            else:
                flat, stop = self._summed(self._packed(xp, [*packed, *tail]), True)
                last = flat[-2:]
            summed, start = {}, 0
            for name, dW in gradients.items():
                size = int(np.prod(dW.shape))
                summed[name] = xp.reshape(flat[start : start + size], dW.shape)
                start += size
            return xp.astype(xp.reshape(last[:1], ()), value.dtype, copy=False), summed, stop > 0

    def _packed(self, xp: Any, arrays: list[Array]) -> Array:
        """All in one array; on NumPy in the same memory each step, as fresh pages cost more than the copying."""
        if not isinstance(arrays[0], np.ndarray):
            return xp.concat(arrays)
        key = sum(x.size for x in arrays), arrays[0].dtype.char
        if key not in self._staging:
            self._staging[key] = np.empty(*key)
        return np.concatenate(arrays, out=self._staging[key])

    def _summed(self, x: Array, flagged: bool) -> tuple[Array, float]:
        """`x`, which is ours to write to, summed over all ranks, and its last element, of use if that is the flag."""
        place = Device.of(x)
        if place.kind != "cuda":
            host = place.to_numpy(x)
            host = host if host.flags.writeable else host.copy()
            self._complete(self._comm.Iallreduce(self.MPI.IN_PLACE, host), host)
            return place.asarray(host), float(host[-1])
        if self.device_buffers:
            import cupy

            cupy.cuda.get_current_stream().synchronize()  # MPI knows no streams, and would send what is not there yet
            self._complete(self._comm.Iallreduce(self.MPI.IN_PLACE, x), x)
            return x, float(x[-1])
        host = self._pinned(x)
        x.get(out=host)  # which waits for the stream
        self._complete(self._comm.Iallreduce(self.MPI.IN_PLACE, host), host)
        x.set(host)
        return x, float(host[-1])

    def _pinned(self, x: Array) -> Any:
        """Page-locked memory on the host for `x`, the same each time."""
        import logging

        import cupyx

        if not self._said and self.rank == 0:
            logging.getLogger(__name__).warning(
                "%s does not say that it is CUDA-aware, so gradients go through host memory; "
                "if it is, set ANYARRAY_MPI_CUDA=1",
                self._library(),
            )
        self._said = True
        key = x.size, x.dtype.char
        if key not in self._staging:
            self._staging[key] = cupyx.empty_pinned(x.shape, x.dtype)
        return self._staging[key]


class _NCCL(_MPI):
    """Ranks over mpi4py, whose gradients NCCL sums on their devices, without the host waiting for them."""

    _sums: Any = None

    def __init__(self, timeout: float, half: bool) -> None:
        super().__init__(None, timeout, half, None)
        self._flag: Any = None
        self._place = self.device("cuda")
        with self.running():
            self.claim(self._place)
            import cupyx.distributed
            from cupy.cuda import nccl

            if not nccl.available:
                raise RuntimeError("CuPy finds no NCCL here; install it as CuPy's manual says, or train over MPI alone")
            with self._place:
                self._sums = cupyx.distributed.init_process_group(self.size, self.rank, use_mpi=True)

    def _unfinished(self) -> bool:
        return self._sums is not None

    def _library(self) -> str:
        return f"NCCL and {super()._library()}"

    @contextmanager
    def running(self) -> Iterator[None]:
        self._flag = self._flag if self._comm is not None else None
        with super().running():
            yield

    def _summed(self, x: Array, flagged: bool) -> tuple[Array, float]:
        if Device.of(x) != self._place:
            raise ValueError(
                f"the gradients are on {Device.of(x)}, but this rank's NCCL is on {self._place}; "
                "build the model with device=group.device()"
            )
        self._joined += 1
        self._sums.all_reduce(x, x)  # on the current stream, as everything before and after it
        return x, self._flag_before(x) if flagged else 0.0

    def _flag_before(self, x: Array) -> float:
        """The last element of the sum *before* this one, which is there by now: so the host never waits for this one."""
        import cupy
        import cupyx

        before = self._flag
        host, event = cupyx.empty_pinned((1,), x.dtype), cupy.cuda.Event(disable_timing=True)
        x[-1:].get(out=host, blocking=False)
        event.record()
        self._flag = host, event, self._joined
        if before is None:
            return 0.0
        host, event, number = before
        self._wait(lambda: event.done, number)
        return float(host[0])


def mpi(*, comm: Any = None, timeout: float = 300.0, half: bool = False, device_buffers: bool | None = None) -> Group:
    """The group of all processes that `mpiexec` started, for `fit(..., group=mpi())`.

    comm: an mpi4py communicator, if not all of them. timeout: after so many seconds without a sign of a rank, the others
    stop; it must be longer than the slowest callback and the writing of a checkpoint. half: send gradients as float16 (see
    `docs/distributed.md` for the error and where it pays). device_buffers: whether this MPI takes CUDA memory, which is
    otherwise asked of it; where it does not, gradients go through host memory.

    Every process must call it. Raises `ImportError` without mpi4py.
    """
    return _MPI(comm, timeout, half, device_buffers)


def nccl(*, timeout: float = 300.0, half: bool = False) -> Group:
    """As `mpi`, with the gradients summed by NCCL through `cupyx.distributed`: one CUDA device for each process.

    A wish to stop takes effect one step later than over MPI, for the host does not wait for the step at hand.

    Every process must call it. Raises `ImportError` without mpi4py, `DeviceUnavailableError` without a device, `RankError`
    where two ranks have one device, and `RuntimeError` where CuPy has no NCCL.
    """
    return _NCCL(timeout, half)


def launched() -> tuple[int, int]:
    """How many processes `mpiexec` started together, and the number of this one, by what MPICH and Open MPI tell them."""
    for names in (("PMI_SIZE", "PMI_RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        size, rank = (os.environ.get(name, "") for name in names)
        if size.isdecimal() and rank.isdecimal():
            return int(size), int(rank)
    return 1, 0


def _seat() -> tuple[set[int], int]:
    """The cores that this process may use, and how many threads its BLAS takes."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    given = (os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    return cores, next((int(text) for text in given if text.isdecimal() and int(text)), len(cores))


def _fitting_threads(seats: list[tuple[set[int], int]]) -> int | None:
    """How many BLAS threads each process on a machine should have, where they have more; else `None`."""
    cores = set().union(*(own for own, _ in seats))
    fitting = max(1, len(cores) // len(seats))
    return fitting if sum(threads for _, threads in seats) > max(len(cores), len(seats)) else None


def _process_space() -> str:
    """What tells whether two processes see each other by number; `""` where that cannot be told."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _mpi4py() -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ImportError(
            'several processes need mpi4py and an MPI: pip install "anyarray_linear[mpi]", and for want of an MPI '
            f"pip install mpich ({error})"
        ) from error
    return MPI


# ---------------------------------------------------------------------------------------------------------------------
# the state that is equal on all ranks


def snapshot(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights and optimizer on the host, to be sent."""
    rule = optimizer.state_dict()
    moments = {name: {m: Device.of(x).to_numpy(x) for m, x in own.items()} for name, own in rule["moments"].items()}
    weights = {name: Device.of(W).to_numpy(W) for name, W in parameters(model).items()}
    return {"weights": weights, "optimizer": {**rule, "moments": moments}}


def adopt(model: Any, optimizer: Any, sent: Mapping[str, Any]) -> None:
    """Be what `snapshot` saw elsewhere."""
    optimizer.load_state_dict(sent["optimizer"])
    for name, layer in leaves(model):
        for p, W in layer.parameters().items():
            setattr(layer, p, Device.of(W).asarray(sent["weights"][join(name, p)], dtype=W.dtype))


def settings(x: Any) -> str:
    """What tells one loss from another of its class: its `repr`, and what it shows of numbers and texts."""
    shown = {name: value for name, value in sorted(getattr(x, "__dict__", {}).items()) if not name.startswith("_")}
    # machines differ in the last bits of what they compute
    numbers = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in shown.items() if isinstance(v, (int, float, str))}
    text, kind = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(x)), type(x).__name__
    return (text if kind in text else f"{kind}, a {text}") + (f" with {numbers}" if numbers else "")


def digest_of_rows(x: Array, dtype: str) -> str:
    """The SHA-256 of the shape and of the rows in `dtype`; of large data, of as many rows as are 16 million numbers.

    They are read where they are, a part at a time.
    """
    import hashlib

    count, width = x.shape[0], max(1, math.prod(x.shape[1:]))
    found = hashlib.sha256(repr(tuple(x.shape)).encode())
    at_once, most = max(1, _DIGESTED // 16 // width), max(16, _DIGESTED // width)
    spread = np.linspace(0, count - 1, most).astype(int) if most < count else None
    for i in range(0, min(most, count), at_once):
        if spread is None:
            part = x[i : i + at_once, ...]
        elif isinstance(x, np.ndarray):
            part = x[spread[i : i + at_once]]
        else:
            with computing_on(x) as xp:
                part = xp.take(x, Device.of(x).asarray(spread[i : i + at_once]), axis=0)
        with np.errstate(all="ignore"):  # NaN and infinity are told elsewhere
            found.update(np.ascontiguousarray(Device.of(part).to_numpy(part).astype(dtype)).data)
    return found.hexdigest()


def digest(model: Any, optimizer: Any, *more: Any) -> str:
    """The SHA-256 of weights, optimizer and whatever else has to be equal on all ranks."""
    import hashlib

    state = snapshot(model, optimizer)
    found = hashlib.sha256(repr((state["optimizer"]["steps"], more)).encode())
    for name, W in state["weights"].items():
        for x in (W, *state["optimizer"]["moments"].get(name, {}).values()):
            found.update(np.ascontiguousarray(x).data)
    return found.hexdigest()
