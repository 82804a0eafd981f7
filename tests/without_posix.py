"""Python as it is where there is no POSIX: `without_posix.remove()` before `anyarray_linear` is imported; or as a plugin of
pytest, `-p without_posix`.

What NumPy, the standard library and pytest have taken hold of by then stays theirs.
"""

from __future__ import annotations

import os
import shutil  # noqa: F401
import signal
import subprocess  # noqa: F401
import sys
import tempfile  # noqa: F401
from contextlib import suppress

import numpy.random  # noqa: F401

with suppress(ImportError):
    import torch  # noqa: F401

CALLS = (
    *("register_at_fork", "fork", "forkpty", "fchmod", "fchown", "chown", "lchown", "chroot", "mkfifo", "mknod", "pread"),
    *("pwrite", "preadv", "pwritev", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_setaffinity"),
    *("sched_yield", "getuid", "geteuid", "getgid", "getegid", "getgroups", "getpgid", "getsid", "setsid", "setpgid"),
    *("getloadavg", "killpg", "nice", "sysconf", "confstr", "statvfs", "fstatvfs", "uname", "ctermid", "ttyname", "openpty"),
    *("wait", "wait3", "wait4", "waitid", "sync", "memfd_create", "eventfd", "pidfd_open", "getrandom"),
    *("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_DIRECTORY", "O_SYNC", "O_DSYNC", "O_TMPFILE", "O_PATH"),
    *("WNOHANG", "EX_OK", "EX_USAGE"),
)
SIGNALS = ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGCHLD", "SIGQUIT", "SIGWINCH", "pthread_sigmask", "sigwait")
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline")


def remove(*but: str) -> None:
    for module, names in ((os, CALLS), (signal, SIGNALS)):
        for name in names:
            if hasattr(module, name) and name not in but:
                delattr(module, name)
    sys.modules.update(dict.fromkeys(MODULES))


def pytest_configure() -> None:
    remove("getuid", "WNOHANG")  # pytest's own folders need the one, and subprocess the other
