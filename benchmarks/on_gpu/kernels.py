"""The kernels of a training step, by name: how often each is launched, and how long it takes on the card.

The names and times are from CUPTI, by way of PyTorch's profiler, which sees all that this process does on the card. On the
stand-in there are only counts.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

from ..arrays import ByHand, Ours
from ..cases import LR, drawn
from .answering import IS_STAND_IN, tell
from .steps import MODELS, counted

STEPS = 20


def profiled(call: Any) -> list[dict[str, Any]]:
    """What the card does in a step, the longest first: the name, how often, and microseconds altogether."""
    import torch

    torch.cuda.init()
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = re.sub(r"\(.*", "", event.name.removeprefix("std::enable_if<!(false), void>::type "))[:80]
            found.setdefault(name, []).append(event.time_range.elapsed_us())
    rows = [
        {"kernel": name, "per_step": len(us) / STEPS, "us_per_step": round(sum(us) / STEPS, 2)} for name, us in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us_per_step"])


def main() -> None:
    """Tell of a small and a medium model, by hand and as a `TrainingStep`."""
    for model in ("small",) if IS_STAND_IN else ("small", "medium"):
        batch, sizes = MODELS[model]
        for name, contestant in (("step", Ours), ("hand", ByHand)):
            about: dict[str, Any] = {"contestant": name, "model": model, "batch": batch, "sizes": sizes}
            try:
                made: Any = contestant("cuda:0")
                call, _ = made.step(**drawn({"kind": "step", "batch": [batch], "sizes": sizes}), lr=LR)
                if IS_STAND_IN:
                    about["counts"] = counted(call)
                elif find_spec("torch") is None:
                    about["not_here"] = "PyTorch, whose profiler sees the kernels, is not installed"
                else:
                    about["kernels"] = profiled(call)
                about["how"] = getattr(made, "how", lambda: None)()
            except Exception as error:  # noqa: BLE001 - the other one goes on
                about["not_here"] = f"{type(error).__name__}: {error}"[:300]
            tell(**about)


if __name__ == "__main__":
    main()
