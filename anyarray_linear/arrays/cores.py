"""The processor's cores that this process may use."""

from __future__ import annotations

import os


def usable_cores() -> set[int]:
    """Their numbers; all of the machine's where the system does not tell which are ours."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
