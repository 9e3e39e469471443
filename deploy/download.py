"""One file over HTTP: checked, and gone on with where an earlier try stopped.

Rule: what lies under the final name is whole. Until then it is called `.part`, beside it the ETag it belongs to: a file
that has changed at its source is begun anew.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

PART = ".part"
TIMEOUT_S = 30.0
TRIES = 5  # without a byte between them
PAUSE_S = 1.0  # before another try, and twice as long before each one after it


class Broken(Exception):
    """A download that did not come to its end; what came is kept unless it was wrong."""


def download(
    url: str,
    target: Path,
    *,
    size_bytes: int,
    sha256: str = "",
    headers: Mapping[str, str] | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Fetch `url` into `target`, which is replaced when all is there. `report` hears how many bytes are.

    Raises Broken, httpx.HTTPStatusError for an answer that is no file, OSError where it cannot be written.
    """
    part = target.with_name(target.name + PART)
    tries, pause_s = 0, PAUSE_S
    while True:
        before = _size(part)
        try:
            _go_on(url, part, headers or {}, report)
        except httpx.TransportError as error:
            tries = 1 if _size(part) > before else tries + 1
            if tries >= TRIES:
                raise Broken(f"the connection broke off at {_size(part)} of {size_bytes} bytes ({error}); what came is "
                             "kept, and the same command goes on from there") from error
            time.sleep(pause_s)
            pause_s = PAUSE_S if tries == 1 else 2 * pause_s
            continue
        break
    _etag_file(part).unlink(missing_ok=True)
    if (came := _size(part)) != size_bytes:
        part.unlink()
        raise Broken(f"{target.name} came with {came} bytes instead of {size_bytes}: nothing was kept")
    if sha256 and sha256_of(part) != sha256:
        part.unlink()
        raise Broken(f"{target.name} is not what its source says it is (another SHA-256): nothing was kept")
    part.replace(target)


def sha256_of(file: Path) -> str:
    """In hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _go_on(url: str, part: Path, headers: Mapping[str, str], report: Callable[[int], None]) -> None:
    etag = _etag_file(part)
    there = _size(part) if etag.exists() else 0
    asked = dict(headers) | {"accept-encoding": "identity"}
    if there:
        asked |= {"range": f"bytes={there}-", "if-range": etag.read_text()}
    with httpx.stream("GET", url, headers=asked, follow_redirects=True, timeout=TIMEOUT_S) as answer:
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:  # all of it is there
            return
        answer.raise_for_status()
        goes_on = answer.status_code == httpx.codes.PARTIAL_CONTENT
        if known := answer.headers.get("etag"):
            etag.write_text(known)
        with part.open("ab" if goes_on else "wb") as file:
            done = there if goes_on else 0
            for chunk in answer.iter_raw():  # as it comes: a chunk half gathered is lost with its connection
                file.write(chunk)
                done += len(chunk)
                report(done)


def _etag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
