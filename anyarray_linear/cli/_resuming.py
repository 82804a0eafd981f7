"""Going on with a run: its options from its folder, and what there is left to do."""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files.checkpoints import checkpoints
from ..files.models import read_metadata
from ._common import bad
from ._folder import CHECKPOINTS

_OF_THE_CALL = "out", "resume", "overwrite", "processes", "ranks"  # and not of the run
_CHANGEABLE = ("device", "tf32", "epochs", "checkpoint_every", "keep")
MORE = 10
"""How many epochs more are offered."""


def restored(options: Any, given: set[str]) -> list[str]:
    """The command line that goes on with the run in the folder; options `given` again must be what they were."""
    if options.out is None:
        raise bad("resume", "it needs the folder of the run: --out FOLDER")
    path = options.out / "config.json"
    if path.exists() and not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{path} is no regular file; start anew with --overwrite")
    try:
        with path.open(encoding="utf-8") as file:
            stored = dict(json.loads(file.read(1 << 20))["options"])
    except FileNotFoundError:
        raise bad("resume", f"{options.out} holds no run (no config.json); leave out --resume to start one") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); start anew with --overwrite") from error
    now = stored_options(options)
    unknown = sorted(stored.keys() - now.keys())
    if unknown:  # such as "out", which would send all that is written elsewhere
        raise ValueError(f"{path} has the option {unknown[0]!r:.60}, which no run is stored with; remove it from that file")
    fixed_end = stored.get("schedule") != "constant"  # its end is part of the schedule
    for name in given & now.keys():
        fixed = name not in _CHANGEABLE or (name == "epochs" and fixed_end)
        if fixed and now[name] != stored.get(name):
            raise bad(name, f"it is {now[name]}, but the run in {options.out} has {stored.get(name)}; leave it out")
    done = trained_epochs(options.out)
    if "epochs" in given and now["epochs"] < done:
        raise bad("epochs", f"it is {now['epochs']}, but the run in {options.out} has {done} epochs already; "
                            f"for {MORE} more give --epochs {done + MORE}")  # fmt: skip
    stored |= {name: now[name] for name in given & now.keys()}
    if any("\0" in str(value) for value in stored.values()):  # which nobody can have typed, and no file system takes
        raise ValueError(f"{path} is damaged (it has a text with a NUL); start anew with --overwrite")
    arguments = []
    for name, value in stored.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool) and isinstance(now[name], bool):
            arguments.append(f"--{'' if value else 'no-'}{flag}")
        elif value is not None:
            arguments.append(f"--{flag}={value}")
    arguments += ["--overwrite"] * options.overwrite
    arguments += [] if options.processes is None else [f"--distributed={options.processes}"]
    return [*arguments, f"--out={options.out}", "--resume"]  # the last word has who typed it


def stored_options(options: Any) -> dict[str, Any]:
    """The options that config.json keeps, as JSON; where the files are as seen from anywhere."""
    kept = {name: value for name, value in vars(options).items() if name not in _OF_THE_CALL}
    return kept | {"data": None if options.data is None else str(options.data.resolve())}


def trained_epochs(folder: Path) -> int:
    """How many epochs the newest good checkpoint of a run has behind it."""
    return int(_newest(folder).get("epoch", 0))


def nothing_to_do(folder: Path, options: Any) -> str | None:
    """What to tell about a run that has no epoch left, and what to type for more; `None` if it has."""
    state = _newest(folder)
    epochs, stopped = int(state.get("epoch", 0)), bool(state.get("stopped"))
    if epochs < options.epochs and not stopped:
        return None
    if stopped:
        return f"nothing to train: the run in {folder} was stopped early, after epoch {epochs}"
    told = f"nothing to train: the run in {folder} has all of its {epochs} epochs"
    if options.schedule != "constant":
        return f"{told}, at the end of which its schedule of the learning rate ends"
    line = f"anyarray-linear train --out {shlex.quote(str(folder))} --resume --epochs {epochs + MORE}"
    return f"{told}; for {MORE} more: {line}"


def _newest(folder: Path) -> dict[str, Any]:
    """The state in the newest good checkpoint."""
    for path in checkpoints(folder / CHECKPOINTS):
        with suppress(OSError, ValueError):  # told when it is loaded
            state = read_metadata(path)
            if isinstance(state.get("epoch"), int):
                return state
    return {}
