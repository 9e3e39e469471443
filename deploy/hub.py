"""Models from Hugging Face: which files of a repository are needed, and fetching them.

Rule: what cannot be served is refused before its weights are fetched. A download that was cut off goes on where it
stopped. Only files with weights that run no code are taken: safetensors or GGUF.
"""

import errno
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from msgspec import Struct

from deploy.download import Broken, download, sha256_of
from gateway import model_files
from kernels.checkpoint_config import hugging_face_config
from kernels.config import CheckpointError
from kernels.gguf_header import read_gguf_header

Report = Callable[[str, int, int], None]  # what is done, bytes so far, bytes in all

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
MOST_NAMED = 12
STATE = "pulled.json"


class HubRefused(Exception):
    """One sentence on why nothing was fetched, and what would help."""


class State(Struct, frozen=True):
    """What `pulled.json` says of a folder: the revision that its files are of, and whether all are there."""

    revision: str
    whole: bool


class File(NamedTuple):
    name: str
    size_bytes: int


def needed(ref: str, files: Sequence[File], which: str = "") -> list[File]:
    """The files of a repository that a worker and a gateway need.

    `which` names a GGUF file, or the end of its name: `Q4_K_M`. Raises HubRefused.
    """
    top = [file for file in files if "/" not in file.name]
    ggufs = [file for file in top if file.name.lower().endswith(".gguf")]
    small = [file for file in top if file.name in SMALL_FILES]
    shards = [file for file in top if file.name.endswith(".safetensors")]
    # Mistral's own format lies beside that of Hugging Face, and is as large
    shards = [file for file in shards if not file.name.startswith("consolidated")] or shards
    if which:
        return [_gguf_named(ref, ggufs, which)]
    if shards:
        if not any(file.name == "config.json" for file in small):
            raise HubRefused(f"{ref} has safetensors but no config.json: it is no model of its own (an adapter, say)")
        return small + shards
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise HubRefused(f"{ref} has several GGUF files: name one, as in {ref}:{_tag(ggufs[0].name)}; "
                         f"there are {_named(ggufs)}")
    pickles = [file.name for file in top if file.name.endswith((".bin", ".pth", ".pt"))]
    if pickles:
        raise HubRefused(f"{ref} has its weights as pickles only ({pickles[0]}), which can run code: look for a "
                         "conversion to safetensors or GGUF")
    raise HubRefused(f"{ref} has neither safetensors nor GGUF files: it is no language model that can be served")


def fetch(ref: str, which: str, folder: Path, report: Report) -> None:
    """Put the needed files into `folder`. Raises HubRefused, or OSError when the disk is full.

    A model that is whole is used as it is where the hub cannot be asked.
    """
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT")
    have = _state(folder)
    try:
        info = HfApi(endpoint=endpoint).model_info(ref, files_metadata=True)
    except RepositoryNotFoundError:
        raise HubRefused(f"Hugging Face knows no model {ref!r} (or it is private or gated: set HF_TOKEN)") from None
    except (HfHubHTTPError, OSError, *_transport_errors()) as error:
        if have.whole:
            return
        raise HubRefused(f"could not ask Hugging Face for {ref!r}: {_first_line(error)}") from None
    if have == State(info.sha or "", whole=True):
        return
    sums = {one.rfilename: one.lfs.sha256 for one in info.siblings or () if one.lfs}
    files = needed(ref, [File(one.rfilename, one.size or 0) for one in info.siblings or ()], which)
    total, done = sum(file.size_bytes for file in files), 0

    def get(file: File, to: Path, before: int) -> None:
        url = hf_hub_url(ref, file.name, revision=info.sha, endpoint=endpoint)
        _download(url, ref, file, to, sums.get(file.name, ""), lambda now: report("download", before + now, total))

    _check_disk(folder, total)
    if config := next((file for file in files if file.name == "config.json"), None):
        with tempfile.TemporaryDirectory(dir=folder, prefix=".check-") as scratch:
            get(config, Path(scratch) / config.name, 0)
            _check_family(ref, Path(scratch))
    same = have.revision == info.sha
    (folder / STATE).write_bytes(msgspec.json.encode(State(info.sha or "", whole=False)))
    for file in files:
        target = folder / file.name
        if not _is_there(target, file, sums.get(file.name, ""), same):
            get(file, target, done)
        done += file.size_bytes
        report("download", done, total)
    (folder / STATE).write_bytes(msgspec.json.encode(State(info.sha or "", whole=True)))


def _download(url: str, ref: str, file: File, to: Path, sha256: str, report: Callable[[int], None]) -> None:
    import httpx
    from huggingface_hub.utils import build_hf_headers

    try:
        download(url, to, size_bytes=file.size_bytes, sha256=sha256, headers=build_hf_headers(), report=report)
    except (Broken, httpx.HTTPStatusError) as error:
        raise HubRefused(f"could not download {file.name} of {ref!r}: {_first_line(error)}") from None


def _is_there(target: Path, file: File, sha256: str, same_revision: bool) -> bool:
    """Whether a file need not be fetched again: of another revision its sum decides, and where it has none it goes."""
    if not target.exists() or target.stat().st_size != file.size_bytes:
        return False
    return same_revision or (bool(sha256) and sha256_of(target) == sha256)


def _state(folder: Path) -> State:
    try:
        return msgspec.json.decode((folder / STATE).read_bytes(), type=State)
    except (OSError, msgspec.DecodeError):
        return State("", whole=False)


def _check_family(ref: str, folder: Path) -> None:
    try:
        hugging_face_config(folder)
    except CheckpointError as error:
        raise HubRefused(f"{ref} cannot be served: {str(error).replace(str(folder), ref)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _gguf_named(ref: str, ggufs: Sequence[File], which: str) -> File:
    end = which.lower().removesuffix(".gguf")
    found = [file for file in ggufs if file.name.lower().removesuffix(".gguf").endswith(end)]
    if len(found) > 1:
        found = [file for file in found if _tag(file.name).lower() == end] or found
    if len(found) != 1:
        raise HubRefused(f"{ref} has {'no' if not found else 'several'} GGUF files that end in {which!r}; "
                         f"there are {_named(found or ggufs) or 'none'}")
    if "-of-" in found[0].name:
        raise HubRefused(f"{found[0].name} of {ref} is one part of a split GGUF: take one that is whole")
    return found[0]


def _tag(name: str) -> str:
    """`Q4_K_M` of `model-7b-Q4_K_M.gguf`."""
    stem = name[: -len(".gguf")]
    return stem.replace(".", "-").rsplit("-", 1)[-1]


def _named(files: Sequence[File]) -> str:
    tags = [_tag(file.name) for file in files]
    return ", ".join(tags[:MOST_NAMED]) + (f" and {len(tags) - MOST_NAMED} more" if len(tags) > MOST_NAMED else "")


def _check_disk(folder: Path, size_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if shutil.disk_usage(folder).free < size_bytes - there:
        raise OSError(errno.ENOSPC, "too little space")


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the library lets through when a connection breaks: its HTTP client has had two names."""
    found = []
    for name in ("httpx", "httpx2"):
        if importlib.util.find_spec(name):
            found.append(importlib.import_module(name).TransportError)
    return tuple(found)


def prepare(folder: Path) -> None:
    """Derive what a gateway needs from the one GGUF file of a folder, or from its Hugging Face files.

    Raises UnusableModel, CheckpointError.
    """
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        read_gguf_header(ggufs[0])  # the library counts to whatever number a damaged file announces
    model_files.prepare(ggufs[0] if len(ggufs) == 1 else folder, folder)
