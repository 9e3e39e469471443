"""Where things lie on this machine, and who may write there."""

import fcntl
import os
from pathlib import Path
from typing import IO


class FolderInUse(Exception):
    """Another mesh keeps its logs and its broker's store there."""


def cache_folder() -> Path:
    """Models and the compiled CPU step: `$TOKENMILL_CACHE`, else `~/.cache/tokenmill`."""
    return Path(os.environ.get("TOKENMILL_CACHE") or Path.home() / ".cache" / "tokenmill")


def data_folder() -> Path:
    """Logs and the broker's store: `$TOKENMILL_DATA`, else `~/.local/share/tokenmill`."""
    return Path(os.environ.get("TOKENMILL_DATA") or Path.home() / ".local" / "share" / "tokenmill")


def claim(folder: Path) -> IO[str]:
    """Make `folder` with its `logs` and hold it until the file returned is closed or this process dies.

    Raises FolderInUse naming the process that holds it, OSError when it cannot be written.
    """
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise FolderInUse(
            f"another mesh (process {holder}) uses {folder}: stop it, or choose another folder with --data"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock
