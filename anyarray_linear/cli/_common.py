"""What all commands share: exit codes, the one line that an error gets, and the signal handlers."""

from __future__ import annotations

import dis
import signal
import sys
import warnings
from types import FrameType
from typing import Any, Self

import typer

from ._streams import complain, give_up, if_heard, prepare

BAD_INPUT = 2

_RAISE = dis.opmap["RAISE_VARARGS"]


def exit_code_of(app: Any) -> int:
    """Run a typer app on `sys.argv`, print what the user can mend as one line, and return the exit code."""
    prepare()
    warnings.showwarning = _show_warning
    try:
        code = app(standalone_mode=False, prog_name="anyarray-linear")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        give_up("stdout")
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return 128 + signal.SIGINT
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        if hasattr(error, "format_message") and _is_a_further_rank():  # which has the options of rank 0
            return 0  # as a launcher ends all when the first fails, and rank 0 may not have said why
        if line:
            complain(f"error: {line}", *getattr(error, "__notes__", ()))
        return BAD_INPUT
    finally:
        for name in ("stdout", "stderr"):  # what could not be written is still in the stream, and at exit would be code 120
            with if_heard(name):
                pass
    return code if isinstance(code, int) else 0


def _is_a_further_rank() -> bool:
    from ..distributed.launching import launched

    return launched()[1] > 0 and any(word.startswith("--distributed") for word in sys.argv)


def _show_warning(message: Warning | str, *details: Any, **more: Any) -> None:
    """A warning as the user needs it: without the line of code that it came from."""
    warn(str(message))


def one_line(error: Exception) -> str | None:
    """What to tell the user about `error`, or `None` when it is a fault of this package, whose traceback is needed."""
    if hasattr(error, "format_message"):  # typer's own, about options and arguments
        text = error.format_message().replace("Value error, ", "")  # empty where it has shown the help instead
        if errors := getattr(error.__cause__, "errors", None):  # pydantic's, which does not say what it was
            text = text.replace("Input", repr(errors()[0]["input"])[:80], 1)
        text = _with_help(text, getattr(error, "ctx", None))
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    elif isinstance(error, MemoryError):
        text = f"out of memory ({error}); make --batch-size or --hidden smaller, or use another --device"
    elif isinstance(error, OSError) or _is_worded(error):
        text = str(error)
    else:
        return None
    return " ".join(text.split())


def _with_help(text: str, context: Any) -> str:
    """Typer's words about a word that it does not know, or misses, and where to look."""
    if context is None or not text.startswith(("Got", "No such", "Missing")) or "(Possible" in text or text.endswith("?"):
        return text
    data = "unexpected extra argument" in text and context.info_name == "train"
    return f"{text.removesuffix('.')}; " + ("data go in by --data FILE" if data else f"see: {context.command_path} --help")


def _is_worded(error: Exception) -> bool:
    """Whether a `raise` of this package made `error`: then its message is written for the user.

    A `ValueError` that NumPy raised, or an operator on the wrong types, is nobody's wording.
    """
    if isinstance(error, AssertionError) or error.__traceback__ is None:
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    package = __name__.partition(".")[0]
    ours = last.tb_frame.f_globals.get("__name__", "").partition(".")[0] == package
    return ours and last.tb_frame.f_code.co_code[last.tb_lasti] == _RAISE


def bad(name: str, message: str) -> typer.BadParameter:
    """The error to raise about the option `--name`."""
    return typer.BadParameter(message, param_hint=f"--{name.replace('_', '-')}")


def warn(line: str) -> None:
    """Say something about what the user has given, without stopping."""
    complain(f"warning: {' '.join(line.split())}")


class StopSignals:
    """A context in which SIGTERM and SIGINT ask for a stop, and a second one exits at once.

    It is the stop flag that `fit` takes: `is_set()`. `exit_code` is 143 or 130 after a signal, else 0.
    """

    _signals = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.exit_code = 0

    def is_set(self) -> bool:
        """Whether a signal has arrived."""
        return self.exit_code != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_set():
            # not os._exit: unwinding takes away the file that is just being written
            raise SystemExit(128 + number)
        self.exit_code = 128 + number

    def __enter__(self) -> Self:
        self._before = [signal.signal(number, self._note) for number in self._signals]
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in zip(self._signals, self._before, strict=True):
            signal.signal(number, handler)
