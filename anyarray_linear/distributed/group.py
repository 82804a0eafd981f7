"""What processes that train one model together can do, here for a process alone; `over_mpi` and `over_nccl` for several.

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

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..arrays.device import Device
from ..arrays.place import Array
from ..arrays.selection import select_device


class RankError(RuntimeError):
    """Another rank failed, fell silent, or is not what the others are; the message names it.

    ranks: the numbers of the ranks that it is about.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:  # the default is for pickles
        super().__init__(message)
        self.ranks = ranks


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
