"""`tokenmill` run as people run it: a process of its own, in a folder that has traps, with or without a terminal."""

import contextlib
import fcntl
import os
import pty
import re
import secrets
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.models import default_folder

HOME = Path(__file__).resolve().parents[2]
MARK = "TOKENMILL_TEST_MARK"
START = f"import sys; sys.path.append({str(HOME)!r}); from deploy.cli import main; main()"
GIVE_UP_S = 60.0


class Command:
    """One running `tokenmill`. `output` is what it printed so far, without colours; `errors` its standard error."""

    def __init__(self, folder: Path, *arguments: str, terminal: tuple[int, int] | None = None) -> None:
        (folder / "worker").mkdir(parents=True, exist_ok=True)
        (folder / "worker" / "__init__.py").write_text("raise ImportError('this is the worker of somebody else')")
        self.mark = secrets.token_hex(8)
        environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
        environment |= {MARK: self.mark}
        environment |= {"TOKENMILL_CACHE": str(folder / "cache"), "TOKENMILL_DATA": str(folder / "data")}
        self._read: dict[int, bytes] = {}
        command = [sys.executable, "-P", "-c", START, *arguments]
        if terminal is None:
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, start_new_session=True)
            assert self.process.stdout is not None and self.process.stderr is not None
            self._out, self._err = self.process.stdout.fileno(), self.process.stderr.fileno()
        else:
            self._out, theirs = pty.openpty()
            self._err = self._out
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", terminal[1], terminal[0], 0, 0))
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment | {"TERM": "xterm-256color"}, stdin=theirs, stdout=theirs,
                stderr=theirs, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
            os.close(theirs)
        ends = {self._out, self._err}
        self._readers = [threading.Thread(target=self._drain, args=(end,), daemon=True) for end in ends]
        for reader in self._readers:
            reader.start()

    @property
    def output(self) -> str:
        return _plain(self._read.get(self._out, b""))

    @property
    def errors(self) -> str:
        return _plain(self._read.get(self._err, b""))

    def until(self, true: Callable[[], object]) -> None:
        """Wait until `true()`. Raises AssertionError with what was printed when it ends before or takes long."""
        give_up = time.monotonic() + GIVE_UP_S
        while not true():
            assert time.monotonic() < give_up, f"waited in vain\n{self.output}\n{self.errors}"
            assert self.process.poll() is None or true(), f"it ended\n{self.output}\n{self.errors}"
            time.sleep(0.02)

    def until_printed(self, text: str) -> None:
        self.until(lambda: text in self.output)

    def until_gone(self) -> None:
        """Nothing of it is left, whoever its parent is by now."""
        give_up = time.monotonic() + GIVE_UP_S
        while left := self.pids():
            assert time.monotonic() < give_up, f"left: {left}"
            time.sleep(0.02)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def type(self, keys: bytes) -> None:
        """At its terminal."""
        os.write(self._out, keys)

    def code(self) -> int:
        """Its exit code, once it has ended and all it printed was read."""
        code = self.process.wait(GIVE_UP_S)
        for reader in self._readers:
            reader.join(GIVE_UP_S)
        return code

    def pids(self, *words: str) -> list[int]:
        """Living processes it started, itself included, with all of `words` in their command line."""
        return [pid for pid in _living() if self._is_ours(pid) and all(word in _read(pid, "cmdline") for word in words)]

    def kill(self) -> None:
        """End whatever is left of it."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(GIVE_UP_S)

    def _is_ours(self, pid: int) -> bool:
        return f"{MARK}={self.mark}" in _read(pid, "environ")

    def _drain(self, end: int) -> None:
        # a terminal whose other side is closed says EIO
        with contextlib.suppress(OSError):
            while chunk := os.read(end, 65536):
                self._read[end] = self._read.get(end, b"") + chunk


@contextlib.contextmanager
def tokenmill(folder: Path, *arguments: str, terminal: tuple[int, int] | None = None) -> Iterator[Command]:
    """A `tokenmill` that is gone afterwards. `terminal`: columns and lines."""
    command = Command(folder, *arguments, terminal=terminal)
    try:
        yield command
    finally:
        command.kill()


def up(port: int, *more: str) -> list[str]:
    """`up` with the mock engine: what it says does not depend on the model."""
    return ["up", "--engine", "mock", "--model", str(default_folder()), "--port", str(port), *more]


def _living() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]


def _read(pid: int, what: str) -> str:
    """A file of /proc; empty for a process that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _plain(data: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace")).replace("\r\n", "\n")
