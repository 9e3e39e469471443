"""Where things lie on this machine."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Models and the compiled CPU step: `$TOKENMILL_CACHE`, else `~/.cache/tokenmill`."""
    return Path(os.environ.get("TOKENMILL_CACHE") or Path.home() / ".cache" / "tokenmill")


def data_folder() -> Path:
    """Logs and the broker's store: `$TOKENMILL_DATA`, else `~/.local/share/tokenmill`."""
    return Path(os.environ.get("TOKENMILL_DATA") or Path.home() / ".local" / "share" / "tokenmill")
