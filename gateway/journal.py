"""What a gateway owes the ledger, on its own disk: so that nothing is lost when it is killed before it was written.

A line for each request that has ended, at once, and one a second for each that still runs and has gone on; the last
line of a request counts. The next gateway in this folder settles what it finds. The ledger takes a request once, so a
line too many does no harm.

    1.jsonl   full: goes when all that ended in it is in the ledger (who still runs stands again in the next file)
    2.jsonl   grows

Rules: lines are handed to the system one by one, whole, and live on when the process does not; when the machine itself
dies, what it had not put on the disk is lost. A line that is no record (half of the last one) is left out, and said.
One gateway per folder: a lock sees to it.
"""

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog
from msgspec import Struct

from gateway.ledger import Record

FULL_BYTES = 4 << 20
_LOCK = "lock"
_ENDING = ".jsonl"

log = structlog.get_logger("gateway.journal")


class Note(Struct, frozen=True):
    """One request, as it stands; `lease`: under which it runs, or empty."""

    record: Record
    lease: str = ""
    ended: bool = True


class _Full(NamedTuple):
    path: Path
    ended: int  # goes when so many of the requests that ended here are in the ledger


class Journal:
    """The folder of one gateway."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError, with a sentence for a folder that another gateway has."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        self._lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise OSError(error.errno, f"another gateway keeps its journal in {folder}: give each a folder of its own "
                                       "with --journal") from None
        self._left = sorted(folder.glob(f"*{_ENDING}"), key=_number)
        self._next = _number(self._left[-1]) + 1 if self._left else 1
        self._encoder = msgspec.json.Encoder()
        self._full: list[_Full] = []
        self._ended = 0
        self._file, self._path, self._size = -1, folder, 0
        self._begin()

    @property
    def is_full(self) -> bool:
        """Whether it is time to turn over."""
        return self._size >= FULL_BYTES

    def left(self) -> list[Note]:
        """What a gateway before this one has not settled, for all that is known; each request once."""
        found: dict[str, Note] = {}
        for path in self._left:
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    note = msgspec.json.decode(line, type=Note)
                except msgspec.DecodeError:
                    log.warning("journal_line_unreadable", file=str(path), line=number)
                    continue
                found[note.record.request] = note
        return list(found.values())

    def settled(self) -> None:
        """What was left is in the ledger."""
        for path in self._left:
            path.unlink(missing_ok=True)
        self._left = []

    def note(self, note: Note) -> None:
        """Write a line. Raises OSError."""
        line = self._encoder.encode(note) + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError(f"the disk of {self._folder} is full")
        self._size += len(line)
        self._ended += note.ended

    def turn_over(self, running: Iterable[Note]) -> None:
        """Begin another file, with all that run. Raises OSError."""
        before, path = self._file, self._path
        self._begin()
        for note in running:
            self.note(note)
        os.close(before)
        self._full.append(_Full(path, self._ended))

    def written(self, ended: int) -> None:
        """The ledger has the first so many requests of those that ended here, since the start."""
        while self._full and self._full[0].ended <= ended:
            self._full.pop(0).path.unlink(missing_ok=True)

    def close(self, clean: bool) -> None:
        """`clean`: the ledger has all of it, so nothing need be kept."""
        os.close(self._file)
        if clean:
            for path in (self._path, *(full.path for full in self._full)):
                path.unlink(missing_ok=True)
        os.close(self._lock)

    def _begin(self) -> None:
        self._path = self._folder / f"{self._next}{_ENDING}"
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._next += 1
        self._size = 0


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdigit() else 0
