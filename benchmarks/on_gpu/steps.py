"""A training step by one contestant in one precision: on the card's clock, on the wall's, and the host's time to ask for it.

`python -m benchmarks.on_gpu.steps CONTESTANT PRECISION`. In TF32 the factors of float32 products are rounded to 11 bits, by
each library's own switch. In float16, products are float16, summed in float32; ours has float32 masters and moments, and
scales the loss in a `TrainingStep`, where PyTorch here updates float16 parameters with float16 moments.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import ByHand, Ours, affine
from ..cases import CHECKED_LR, LR, Call, Host, Parameters, drawn
from ..others import Jax, Torch
from .answering import IS_STAND_IN, SCRATCH, tell

MODELS = {"small": (64, (64, 128, 10)), "medium": (256, (784, 1024, 1024, 10)), "large": (2048, (2048, 4096, 4096, 1024))}
"""Batch and sizes."""
BURSTS, BURST = 9, 0.02
"""How many bursts of calls are timed, and the seconds that one lasts."""
FIRST_LOSS = {"float32": 1e-4, "TF32": 1e-2, "float16": 2e-2}
"""How far, relatively, a first loss may be from that of float64: some ten roundings of a factor. A look, not a proof."""


class TorchOf(Torch):
    """PyTorch, eager, in one precision."""

    def __init__(self, precision: str) -> None:
        super().__init__("cuda:0")
        self.torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
        self.dtype = self.torch.float16 if precision == "float16" else self.torch.float32

    def _linear(self, W: Host, b: Host) -> Any:
        return super()._linear(W, b).to(self.dtype)


class TorchGraph(TorchOf):
    """PyTorch, the whole step captured in a CUDA graph once, as its documentation has it."""

    def step(self, parameters: Parameters, X: Host, y: Host, lr: float) -> tuple[Call, Call]:
        torch, nn = self.torch, self.torch.nn
        layers = [self._linear(W, b) for W, b in parameters]
        model = nn.Sequential(*[each for layer in layers for each in (layer, nn.ReLU())][:-1])
        loss, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters(), lr=lr, fused=True, capturable=True)
        X, y = self.put(X), self.put(y)
        start = [p.detach().clone() for p in model.parameters()]

        def once() -> Any:
            optimizer.zero_grad(set_to_none=True)
            value = loss(model(X), y)
            value.backward()
            optimizer.step()
            return value

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                once()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = once()
        with torch.no_grad():  # as if the warm-up had not been
            for p, first in zip(model.parameters(), start, strict=True):
                p.copy_(first)
            for state in optimizer.state.values():
                for x in state.values():
                    x.zero_()

        def call() -> Any:
            graph.replay()
            return value

        return call, lambda: [(layer.weight, layer.bias) for layer in layers]


class JaxOf(Jax):
    """JAX, jitted, in one precision: by default it would take TF32 for float32."""

    def __init__(self, precision: str) -> None:
        import jax

        self.jax, self.version, self.place = jax, f"jax {jax.__version__}", jax.devices("cuda")[0]
        jax.config.update("jax_default_matmul_precision", "tensorfloat32" if precision == "TF32" else "highest")


def _device(precision: str) -> str:
    """The card, asked for TF32 by this library's argument or for float32."""
    from anyarray_linear import select_device

    return str(select_device("cuda:0", tf32=precision == "TF32"))


MAKERS: dict[str, Callable[[str], Any]] = {
    "step": lambda precision: Ours(_device(precision)),
    "hand": lambda precision: ByHand(_device(precision)),
    "lanes_off": lambda precision: ByHand("cuda:0"),  # with ANYARRAY_LANES=0, and CUPY_TF32=1 for TF32
    "torch": TorchOf,
    "torch_graph": TorchGraph,
    "jax": JaxOf,
}


class Clock:
    """The card's clock and the host's, in one library."""

    def __init__(self, contestant: Any) -> None:
        self.contestant = contestant
        if hasattr(contestant, "torch"):
            event = contestant.torch.cuda.Event
            self.events: Any = event(enable_timing=True), event(enable_timing=True)
        elif hasattr(contestant, "jax"):
            self.events = None  # it shows none
        else:
            event = contestant.library.cuda.Event
            self.events = event(), event()

    def wait(self, value: Any) -> None:
        """Until everything that was asked for is done."""
        if hasattr(self.contestant, "torch"):
            self.contestant.torch.cuda.synchronize()
        elif hasattr(self.contestant, "jax"):
            self.contestant.jax.block_until_ready(value)
        else:
            self.contestant.library.cuda.Device(0).synchronize()

    def burst(self, call: Call, repeats: int) -> dict[str, float]:
        """Microseconds per call: of the card, from before the first to after the last; of the wall; of the host's asking."""
        began = time.perf_counter()
        if self.events:
            self.events[0].record()
        for _ in range(repeats):
            value = call()
        if self.events:
            self.events[1].record()
        asked = time.perf_counter()
        self.wait(value)
        ended = time.perf_counter()
        found = {"wall": (ended - began) / repeats * 1e6, "host": (asked - began) / repeats * 1e6}
        if self.events:
            start, end = self.events
            torch = hasattr(self.contestant, "torch")
            elapsed = start.elapsed_time(end) if torch else self.contestant.library.cuda.get_elapsed_time(start, end)
            found["card"] = elapsed / repeats * 1e3
        return found


def quartiles(values: list[float]) -> list[float]:
    """The lower quartile, the median, the upper quartile."""
    return [round(x, 2) for x in statistics.quantiles(values, n=4, method="inclusive")]


def timed(contestant: Any, call: Call) -> dict[str, Any]:
    """Quartiles over the bursts."""
    clock = Clock(contestant)
    for _ in range(4):  # compile, capture, fill the pools
        value = call()
    clock.wait(value)
    once = min(clock.burst(call, 3)["wall"] for _ in range(3)) / 1e6
    repeats = max(3, min(5000, round(BURST / once)))
    bursts = [clock.burst(call, repeats) for _ in range(BURSTS)]
    return {name: quartiles([each[name] for each in bursts]) for name in bursts[0]} | {"repeats": repeats}


def counted(call: Call) -> dict[str, int]:
    """What one warm call asks of the stand-in."""
    from cupy_backends.cpu_counters import NAMES, count

    for _ in range(4):
        call()
    with count() as found:
        call()
    return {name: getattr(found, name) for name in NAMES if getattr(found, name)}


def cast(inputs: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The inputs of a step in a dtype; class ids stay."""
    return {
        "parameters": [(W.astype(dtype), b.astype(dtype)) for W, b in inputs["parameters"]],
        "X": inputs["X"].astype(dtype),
        "y": inputs["y"],
    }


def exact_loss(model: str, dtype: str, inputs: dict[str, Any]) -> float:
    """The first loss in float64, which the largest model takes seconds for: worked out by the first who asks."""
    kept = Path(SCRATCH) / f"exact_loss_{model}_{dtype}"
    if not kept.exists():
        exact = cast(inputs, "float64")
        (W, b), *others = exact["parameters"]
        Z = affine(exact["X"], W, b)
        for W, b in others:
            Z = affine(np.maximum(Z, 0), W, b)
        Z -= Z.max(axis=1, keepdims=True)
        terms = np.log(np.exp(Z).sum(axis=1)) - Z[np.arange(len(Z)), exact["y"]]
        kept.write_text(repr(float(terms.mean())))
    return float(kept.read_text())


def main(name: str, precision: str) -> None:
    """Tell of each model."""
    contestant = MAKERS[name](precision)
    dtype = "float16" if precision == "float16" else "float32"
    for model, (batch, sizes) in MODELS.items():
        if IS_STAND_IN and model != "small":
            continue
        inputs = cast(drawn({"kind": "step", "batch": [batch], "sizes": sizes}), dtype)
        about: dict[str, Any] = {"contestant": name, "version": contestant.version, "precision": precision, "model": model}
        about |= {"batch": batch, "sizes": sizes}
        try:
            first, _ = contestant.step(**inputs, lr=CHECKED_LR)
            about["loss"] = float(contestant.get(first()))
            expected = exact_loss(model, dtype, inputs)
            if abs(about["loss"] - expected) > FIRST_LOSS[precision] * expected:
                about["wrong"] = f"its first loss is {about['loss']}, and {expected} in float64"
            call, _ = contestant.step(**inputs, lr=LR)
            about |= {"counts": counted(call)} if IS_STAND_IN else timed(contestant, call)
            about["how"] = getattr(contestant, "how", lambda: None)()
        except Exception as error:  # noqa: BLE001 - one model may be too large, or a library broken: the others go on
            about["not_here"] = f"{type(error).__name__}: {error}"[:300]
        tell(**about)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ImportError, RuntimeError) as error:
        tell(contestant=sys.argv[1], precision=sys.argv[2], not_here=f"{type(error).__name__}: {error}"[:300])
