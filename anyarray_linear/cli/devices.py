"""The `devices` command: which devices work here, and why one does not."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from ..arrays import cards, doctor, remedies, tf32
from ..arrays.device import Device
from ..arrays.selection import DeviceUnavailableError, select_device
from ..linear import linear_forward
from ..testing import check_step
from ._streams import Terminal


def devices(
    doctor_: Annotated[
        bool, typer.Option("--doctor", help="Show every step that proves that CUDA works, or the first that fails.")
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="SPEC", help='"auto", "cpu", "cuda" or "cuda:N"; exit 1 when it cannot be used.')
    ] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """List the devices that work here, and say which one is chosen and why.

    A CUDA device is listed once a kernel and a matrix product have run on it. With --doctor, each step is shown with its
    time, a training step among them, and for the first failure what to do about it.

    **Examples**

    - `anyarray-linear devices`
    - `anyarray-linear devices --doctor`
    - `anyarray-linear devices --device cuda:1 --json`
    """
    report = _report(device)
    if doctor_:
        for name, steps in report["examinations"].items():
            if steps[-1]["ok"]:
                steps += [_training_step(name), _tf32_step(name)]
    if json_:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report, with_steps=doctor_)
    if report["error"] is not None:
        raise typer.Exit(1)


def _report(spec: str) -> dict[str, Any]:
    """Everything the command knows, as JSON: devices, the steps of each examination, and the chosen device."""
    chosen, error = None, None
    try:
        chosen = select_device(spec)
    except DeviceUnavailableError as unavailable:
        error = str(unavailable)
    except ValueError as unknown:
        raise typer.BadParameter(str(unknown)) from None
    numbers: list[int | None] = [*range(doctor.count())] or [None]
    if spec.startswith("cuda:") and (asked := int(spec[5:])) not in numbers:
        numbers = [asked]
    examinations = {index: doctor.examine(index) for index in numbers}
    working = [index for index, steps in examinations.items() if steps[-1].ok and index is not None]
    return {
        "devices": [_row(select_device("cpu")), *(_row(select_device(f"cuda:{index}")) for index in working)],
        "examinations": {
            "cuda" if index is None else f"cuda:{index}": [
                {"step": step.name, "ok": step.ok, "seconds": step.seconds, "found": step.found, "cure": step.cure or None}
                for step in steps
            ]
            for index, steps in examinations.items()
        },
        "chosen": None if chosen is None else str(chosen),
        "reason": None if chosen is None else chosen.reason,
        "error": error,
        "warnings": [caution for index in working for caution in cards.cautions(index)],
    }


def _training_step(name: str) -> dict[str, Any]:
    """What the doctor's steps lead up to: a training step there, captured as a CUDA graph if it can be."""
    began = time.perf_counter()
    try:
        taken = check_step(name)
        found, cure = f"right, {taken.how}", ""
        if taken.complaint:
            found, cure = taken.complaint, "See what verify says, and compute elsewhere (ANYARRAY_DEVICE=cpu)."
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding here
        found, cure = remedies.explain(error)
    seconds = time.perf_counter() - began
    return {"step": "training step", "ok": not cure, "seconds": seconds, "found": found, "cure": cure or None}


def _tf32_step(name: str) -> dict[str, Any]:
    """Whether TF32 can be had there, and whether products that ask for it round their factors. Neither is a failure."""
    began = time.perf_counter()
    try:
        with tf32.restored():
            device = select_device(name, tf32=True)
            X = np.full((256, 256), 1 + 2**-12, np.float32)  # which 11 bits do not hold
            Z = linear_forward(device.asarray(X), device.asarray(np.eye(256, dtype=np.float32)))
            rounds = not np.array_equal(device.to_numpy(Z), X)
        found = "rounds factors to 11 bits" if rounds else "asked for, but the products were those of float32"
        found += '; off unless asked for: select_device("cuda", tf32=True), --tf32 of train and verify, CUPY_TF32=1'
        cure = ""
    except DeviceUnavailableError as error:
        found, cure = str(error), ""
    except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding here
        found, cure = remedies.explain(error)
    return {"step": "TF32", "ok": not cure, "seconds": time.perf_counter() - began, "found": found, "cure": cure or None}


def _row(device: Device) -> dict[str, Any]:
    row: dict[str, Any] = {"device": str(device), "name": device.name, "memory_free": None, "memory_total": None}
    with contextlib.suppress(NotImplementedError):
        row["memory_free"], row["memory_total"] = device.memory()
    return row if device.index is None else row | cards.facts(device.index)


def _print(report: dict[str, Any], *, with_steps: bool) -> None:
    console = Terminal()
    table = Table(box=None, padding=(0, 1, 0, 0))  # so that the rows of a card fit a window of 80 columns
    for head in ("device", "name", "compute\ncapability", "free / total\nin GiB", "driver", "CuPy", "float32\nproducts"):
        table.add_column(head, no_wrap=head != "name")
    for row in report["devices"]:
        memory = "" if row["memory_free"] is None else f"{_gib(row['memory_free'])} / {_gib(row['memory_total'])}"
        driver = f"CUDA {row['driver_cuda']}" if "driver_cuda" in row else ""
        table.add_row(
            row["device"], row["name"], row.get("compute_capability", ""), memory, driver,
            row.get("cupy", ""), row.get("float32_products", ""),
        )  # fmt: skip
    console.print(table)
    if with_steps:
        for name, steps in report["examinations"].items():
            table = Table("step", "verdict", "seconds", "found", title=name, title_justify="left")
            for step in steps:
                verdict = "[green]works[/]" if step["ok"] else "[red]fails[/]"
                table.add_row(step["step"], verdict, f"{step['seconds']:.3f}", escape(step["found"]))
            console.print(table)
            if steps[-1]["cure"]:
                console.print(f"To cure it: {steps[-1]['cure']}", style="bold", markup=False, soft_wrap=True)
    for warning in report["warnings"]:
        console.print(warning, style="yellow", markup=False, soft_wrap=True)
    if report["error"] is not None:
        typer.echo(report["error"], err=True)
    else:
        console.print(f"Chosen: {report['chosen']}, because {report['reason']}", markup=False, soft_wrap=True)
    if not with_steps and not all(steps[-1]["ok"] for steps in report["examinations"].values()):
        console.print("What to do about CUDA: --doctor says it.")


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
