"""One contestant in a process of its own: it prepares a case, hands out its results, and times bursts.

Run as `python -m benchmarks.worker NAME DEVICE`. A request is a line of JSON on standard input, and its answer one on
standard output. Every process draws the same inputs from the same seed, so none are passed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from .arrays import ByHand, Limit, Ours, Plain
from .cases import CHECKED_LR, CHECKED_STEPS, KINDS, LR, Call, Host, drawn
from .others import Jax, Sklearn, Thinc, Torch
from .processes import ends_with_its_parent

WARM = 150
"""Steps before timing, at most, of a contestant that says it takes the portable way."""
BURSTS = 3
"""Bursts per request, of which the fastest counts."""
CONTESTANTS: dict[str, type[Any]] = {
    "ours": Ours,
    "hand": ByHand,
    "numpy": Plain,
    "torch": Torch,
    "jax": Jax,
    "thinc": Thinc,
    "sklearn": Sklearn,
    "limit": Limit,
}
COUNTED = ("launches", "library_calls", "allocations", "host_to_device", "device_to_host", "synchronizations")


TRAINS = ("step", "optimizer")
"""The kinds of cases that change parameters; what they return is how they are read, besides the call."""


def _nothing() -> None:
    """What a contestant says that has but one way."""


class Server:
    """Answers requests about one contestant; between `prepare` and the next one it holds one case."""

    def __init__(self, contestant: Any) -> None:
        self.contestant = contestant
        self.call: Call = list
        self.repeats = 1

    def prepare(self, case: dict[str, Any], results: str | None, burst: float | None) -> dict[str, Any]:
        """Make a case ready; save what it computes to the file `results`; find how many calls last `burst` seconds."""
        self.call = list  # lets go of the last case's memory first
        self.contestant.how = _nothing
        made, inputs = getattr(self.contestant, case["kind"]), drawn(case)
        if results is not None:
            computed: dict[str, Any] = self._results(case, inputs)
            np.savez(results, **computed)
        self.call = made(**inputs, lr=LR)[0] if case["kind"] in TRAINS else made(**inputs)
        self.call()
        for _ in range(WARM):  # a lane may wait until steps are many
            if not str(self.contestant.how()).startswith("portable"):
                break
            self.call()
        if burst is None:
            return {}
        self.repeats = 1
        while (took := self._fastest(2) * self.repeats) < burst:
            self.repeats = max(self.repeats + 1, min(10 * self.repeats, math.ceil(1.2 * self.repeats * burst / took)))
        return {"repeats": self.repeats}

    def how(self) -> dict[str, Any]:
        """By which way the case ran, where the contestant says so."""
        return {"how": self.contestant.how()}

    def _results(self, case: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Host]:
        get = self.contestant.get
        if case["kind"] not in TRAINS:
            results = getattr(self.contestant, case["kind"])(**inputs)()
            return {name: get(x) for name, x in zip(("Z", "dX", "dW", "db"), results, strict=False)}
        step, parameters = getattr(self.contestant, case["kind"])(**inputs, lr=CHECKED_LR)
        loss = getattr(self.contestant, "loss", get) if case["kind"] == "step" else lambda nothing: 0.0
        results = {"loss": np.asarray([float(loss(step())) for _ in range(CHECKED_STEPS)])}
        for i, (before, after) in enumerate(zip(inputs["parameters"], parameters(), strict=True)):
            for name, x, now in zip("Wb", before, after, strict=True):
                results[f"change of {i}.{name}"] = get(now).reshape(x.shape) - x
        return results

    def burst(self) -> dict[str, Any]:
        """Seconds per call: of several bursts the fastest, since a disturbance only ever adds time."""
        self.contestant.seconds(self.call, math.ceil(self.repeats / 4))  # threads and caches as in the midst of work
        return {"seconds": self._fastest(BURSTS)}

    def _fastest(self, bursts: int) -> float:
        seconds: Callable[[Call, int], float] = self.contestant.seconds
        return min(seconds(self.call, self.repeats) for _ in range(bursts))

    def count(self) -> dict[str, Any]:
        """What one call asks of the emulated device; only the CPU stand-in of CuPy can count."""
        count = import_module("cupy_backends.cpu_counters").count
        self.call()
        with count() as counted:
            self.call()
        return {name: int(getattr(counted, name)) for name in COUNTED}

    def digits(self, seed: int) -> dict[str, Any]:
        """A training of the digits from its first line to its last, and the accuracy on what was kept back."""
        seconds, accuracy = self.contestant.digits(seed)
        return {"seconds": seconds, "accuracy": accuracy}

    def roofs(self, quick: bool) -> dict[str, Any]:
        """What the machine can do."""
        found: dict[str, float] = self.contestant.roofs(quick)
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve standard input until it ends."""
    name, device = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command that started this
    ends_with_its_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    server: Any = None
    try:
        server = Server(CONTESTANTS[name](device))
        kinds = [kind for kind in (*KINDS, "digits") if hasattr(server.contestant, kind)]
        answer: dict[str, Any] = {"version": server.contestant.version, "kinds": kinds}
    except Exception as error:  # noqa: BLE001 - a library may be broken in any way; the parent says how
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
