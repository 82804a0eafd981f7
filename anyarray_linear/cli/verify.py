"""The `verify` command: the proof, on the user's own machine, that every backend and device computes the same thing."""

from __future__ import annotations

import json
import math
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module, metadata, util
from itertools import groupby
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from ..arrays import cards, doctor, tf32
from ..arrays.device import Device
from ..arrays.selection import select_device
from ..linear import Linear
from ..testing import adjoint_check, check_step, compare, gradcheck, usable_devices
from ._common import bad
from ._streams import Terminal

SHAPES: tuple[tuple[tuple[int, ...], int], ...] = (((32, 512), 64), ((4, 25, 100), 10))
"""The shapes of `X`, and `out_features`."""
OUTPUTS = ("Z", "dX", "dW", "db")


def verify(
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    require_cuda: Annotated[bool, typer.Option("--require-cuda", help="Exit 1 when no CUDA device was verified.")] = False,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help='"cpu", "cuda" or "cuda:N", repeatable; by default all that work here.'),
    ] = None,
    tf32_: Annotated[
        bool, typer.Option("--tf32", help="Form float32 products in TF32 on CUDA devices, and hold them to its bounds.")
    ] = False,
) -> None:
    """Compute a linear layer on every backend and device that works here, and hold it to the theory of rounding errors.

    Forward and every gradient are compared, element by element, with a float64 reference of the same rounded inputs: Z, dX,
    dW and db show the worst error as a share of the sharp bound for random data. gradcheck is the relative error against
    finite differences in float64, adjoint the difference of <dZ, J V> and <J^T dZ, V> as a share of its bound. step is a
    whole training step, captured as a CUDA graph or compiled where it can be, as a share of the hard limit. Exit code 1
    when anything is over its bound. Where float32 products are formed in TF32, the row says so, and the bounds are those of
    factors of 11 bits.

    **Examples**

    - `anyarray-linear verify`
    - `anyarray-linear verify --device cpu --device cuda:0`
    - `anyarray-linear verify --device cuda --tf32`
    - `anyarray-linear verify --require-cuda --json`
    """
    with tf32.restored():
        report = _report(device, in_tf32=tf32_)
    if require_cuda and not any(row["device"].startswith("cuda") for row in report["rows"]):
        report["complaints"].append("no CUDA device was verified; see: anyarray-linear devices --doctor")
    report["ok"] = not report["complaints"]
    if json_:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    if not report["ok"]:
        raise typer.Exit(1)


def _report(specs: list[str] | None, *, in_tf32: bool) -> dict[str, Any]:
    """Everything the command finds out, as JSON."""
    places, missing = _places() if specs is None else (list(map(select_device, specs)), {})
    if in_tf32:
        cards_here = [place for place in places if place.kind == "cuda"]
        if not cards_here:
            raise bad("tf32", "TF32 is of CUDA devices, and none is verified; see: anyarray-linear devices --doctor")
        for place in cards_here:
            select_device(place, tf32=True)
    checked = [
        _checked(place, dtype, shape, out_features)
        for place in places
        for dtype in _dtypes(place)
        for shape, out_features in SHAPES
    ]
    cuda = {str(place): cards.facts(place.index) | _runtime() for place in places if place.index is not None}
    return {
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("numpy", "array-api-compat")},
        "cuda": cuda,
        "rows": [row for row, _ in checked],
        "not_here": missing,
        "complaints": [complaint for _, complaints in checked for complaint in complaints],
    }


def _places() -> tuple[list[Device], dict[str, str]]:
    """One `Device` for everything that arrays can be on here, and why other libraries are not among them."""
    places, missing = usable_devices(), {}
    if not any(place.kind == "cuda" for place in places):
        last = doctor.examine()[-1]
        missing["cupy"] = last.found
    for name, arrays in {"array_api_strict": _strict, "torch": _torch, "jax": _jax}.items():
        if util.find_spec(name) is None:
            missing[name] = f"{name} is not installed"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                places += [Device.of(x) for x in arrays(import_module(name))]
        except Exception as error:  # noqa: BLE001 - an installation may be broken in any way
            missing[name] = f"{type(error).__name__}: {error}"
    return places, missing


def _runtime() -> dict[str, str]:
    version = import_module("cupy").cuda.runtime.runtimeGetVersion()
    return {"runtime_cuda": f"{version // 1000}.{version % 1000 // 10}"}


def _strict(strict: Any) -> Iterator[Any]:
    yield strict.zeros(1, device=strict.Device("device1"))  # not the default device, so that a stray array is noticed


def _torch(torch: Any) -> Iterator[Any]:
    yield torch.zeros(1)
    if torch.cuda.is_available():
        yield torch.zeros(1, device="cuda")


def _jax(jax: Any) -> Iterator[Any]:
    jax.config.update("jax_enable_x64", True)  # without it JAX has no float64, which gradcheck computes in
    yield jax.numpy.zeros(1)


def _dtypes(place: Device) -> tuple[str, ...]:
    return ("float32", "float64", "float16") if place.kind in ("cuda", "torch") else ("float32", "float64")


def _checked(place: Device, dtype: str, shape: tuple[int, ...], out_features: int) -> tuple[dict[str, Any], list[str]]:
    """A row of the table, and what is wrong in it."""
    rng = np.random.default_rng(0)
    X, dZ = rng.standard_normal(shape), rng.standard_normal((*shape[:-1], out_features))
    library = {"cpu": "numpy", "cuda": "cupy"}.get(place.kind, place.kind)
    row: dict[str, Any] = {
        "backend": f"{library} {import_module(library).__version__}",
        "device": str(place),
        "name": place.name,
        "dtype": dtype,
        "products": "TF32" if dtype == "float32" and place.tf32 else dtype,
        "shape": [*shape, out_features],
    }
    complaints: list[str] = []

    def attempt(what: str, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except AssertionError as wrong:
            complaints.extend(f"{row['backend']}: {what}: {line}" for line in str(wrong).splitlines())
        except Exception as error:  # noqa: BLE001 - a device that fails to compute is what this command is to report
            complaints.append(f"{row['backend']} on {place} ({dtype}): {what}: {type(error).__name__}: {error}")
        return None

    # PyTorch's initialisation, for it alone draws a bias
    layer = Linear(shape[-1], out_features, init="pytorch", dtype=dtype, device=place, seed=0)
    found = attempt("bounds", lambda: compare(layer, X, dZ, sharp=True)) or []
    complaints += [f"{row['backend']}: {agreement.complaint}" for agreement in found if agreement.complaint]
    row |= {agreement.output: agreement.sharp_share for agreement in found}
    errors = attempt("gradcheck", lambda: gradcheck(layer, place.asarray(X)))
    shares = attempt("adjoint", lambda: adjoint_check(layer, place.asarray(X, dtype), sharp=True))
    row["gradcheck"] = max(errors.values()) if errors else None
    row["adjoint"] = max(shares.values()) if shares else None
    sizes = {"rows": math.prod(shape[:-1]), "in_features": shape[-1], "out_features": out_features}
    if (taken := attempt("training step", lambda: check_step(place, dtype, **sizes))) is not None:
        complaints += [f"{row['backend']}: {taken.complaint}"] if taken.complaint else []
        row |= {"step": taken.share, "step_by": taken.how}
    row["ok"] = not complaints
    return row, complaints


def _named(row: dict[str, Any]) -> str:
    """Which backend, on what, a row is about."""
    return f"{row['backend']} on {row['device']}" + (f" {row['name']}" if row["name"] != row["device"] else "")


def _print(report: dict[str, Any]) -> None:
    console = Terminal(highlight=False)
    for i, (name, rows) in enumerate(groupby(report["rows"], key=_named)):  # so that the rows fit a window of 80 columns
        console.print(f"\n{name}", style="bold", markup=False, soft_wrap=True)
        table = Table(box=None, show_header=i == 0, padding=(0, 1, 0, 0))
        widths = {"dtype": 7, "X -> Z": 14, **dict.fromkeys(OUTPUTS, 5), "gradcheck": 9, "adjoint": 7, "step": 5}
        for head, width in widths.items():
            table.add_column(head, min_width=width, no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for row in rows:
            *batch, in_features, out_features = row["shape"]
            table.add_row(
                row["products"], f"{'x'.join(map(str, (*batch, in_features)))} -> {out_features}",
                *(f"{row[output]:.1%}" if output in row else "-" for output in OUTPUTS),
                "-" if row["gradcheck"] is None else f"{row['gradcheck']:.0e}",
                "-" if row["adjoint"] is None else f"{row['adjoint']:.1%}",
                f"{row['step']:.1%}" if "step" in row else "-",
                "[green]ok[/]" if row["ok"] else "[red]WRONG[/]",
            )  # fmt: skip
        console.print(table)
    console.print()
    console.print("versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    for name, facts in report["cuda"].items():
        console.print(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items()))
    ways = dict.fromkeys(f"{row['backend']}: {row['step_by']}" for row in report["rows"] if "step_by" in row)
    console.print(f"training steps: {'; '.join(ways)}", markup=False, soft_wrap=True)
    if any(row["products"] == "TF32" for row in report["rows"]):
        console.print("TF32: float32 products with factors of 11 bits, held to a unit roundoff of 2^-11")
    for name, why in report["not_here"].items():
        console.print(f"not verified: {name}: {why}", markup=False, soft_wrap=True)
    for complaint in report["complaints"]:
        print(complaint, file=sys.stderr)
    console.print("All within the bounds." if all(row["ok"] for row in report["rows"]) else "[red]NOT within the bounds.[/]")
