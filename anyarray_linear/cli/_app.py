"""The commands together, and what they have in common: `--help` and `--version`."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata
from typing import Annotated

import typer

from .. import __version__
from .devices import devices
from .explain import explain
from .export import export
from .predict import predict
from .train import train
from .verify import verify

_BACKENDS = ("cupy", "cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "array-api-strict")

app = typer.Typer(
    name="anyarray-linear",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (train, predict, export, devices, verify, explain):
    app.command()(command)


def _show_versions(wanted: bool) -> None:
    """Print the version of this package and of each array library that is installed, importing none of them."""
    if not wanted:
        return
    print(f"anyarray_linear {__version__}, Python {platform.python_version()}")
    for name in ("numpy", "array-api-compat", *_BACKENDS):
        with suppress(metadata.PackageNotFoundError):
            print(f"{name} {metadata.version(name)}")
    print("which of them work here: anyarray-linear verify")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Show the versions of this and of the array libraries that are here.",
        ),
    ] = False,
) -> None:
    """Linear layers with a hand-derived backward pass, on the CPU and on CUDA.

    Start with `anyarray-linear train`: it learns handwritten digits, and says what it wrote where.
    `anyarray-linear COMMAND --help` explains a command, with examples.

    - To learn how the layer works: `explain`.
    - To train, and to answer for new data: `train`, `predict`.
    - To see what works on this machine: `devices`, `verify`.
    """
