"""Traffic as a trace: of each request when it came, how long it and its answer were, and the names of its blocks.

    {"at_s": 1795780800.25, "prompt_tokens": 740, "output_tokens": 212, "block_size_tokens": 16, "hashes": ["5f..", ..]}

Rules: no text, no token, no tenant and no id. A name is half of a block's salted hash: equal for equal beginnings of
one tenant, nothing to anybody else. The file never grows past its bound, and a disk that fails costs the record, not a
request. `tokenmill replay FILE` plays it; files of several gateways are one when they are written one after the other.
"""

from pathlib import Path

import msgspec
import structlog

from shared.blocks import BLOCK_SIZE_TOKENS, HASH_BYTES
from shared.messages import Generate
from shared.tokens import count

NAME_BYTES = 8
# lines kept between two writes; a write comes twice a second
MOST_WAITING_BYTES = 32 << 20

log = structlog.get_logger("gateway")


class Recorded(msgspec.Struct, frozen=True):
    """One line."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    block_size_tokens: int
    hashes: list[str]


class Record:
    """The end of one file. `lost` counts requests that are not in it."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        """Raises OSError when the file cannot be written."""
        self.lost = 0
        self._path = path
        self._most_bytes = most_bytes
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        with path.open("ab") as file:
            self._bytes = file.tell()  # with what waits

    def note(self, at_s: float, request: Generate, output_tokens: int) -> None:
        """A request that came at `at_s` (unix seconds) has ended; one without an answer says nothing of an answer."""
        if not output_tokens:
            return
        prompt_tokens = count(request.tokens)
        # of a stream that was sent again there are hashes of its answer too
        hashes = request.block_hashes[:prompt_tokens // BLOCK_SIZE_TOKENS * HASH_BYTES]
        names = [hashes[start:start + NAME_BYTES].hex() for start in range(0, len(hashes), HASH_BYTES)]
        line = msgspec.json.encode(
            Recorded(round(at_s, 3), prompt_tokens, output_tokens, BLOCK_SIZE_TOKENS, names)) + b"\n"
        if self._bytes + len(line) > self._most_bytes or self._waiting_bytes + len(line) > MOST_WAITING_BYTES:
            if not self.lost:
                log.warning("record_full", path=str(self._path), bytes=self._bytes)
            self.lost += 1
            return
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._bytes += len(line)

    @property
    def some_wait(self) -> bool:
        return bool(self._waiting)

    def write(self) -> None:
        """Put down what waits. For a thread: a disk may take its time."""
        lines, self._waiting, self._waiting_bytes = self._waiting, [], 0
        try:
            # one write each time: gateways of one machine may share a file
            with self._path.open("ab", buffering=0) as file:
                file.write(b"".join(lines))
        except OSError as error:
            self.lost += len(lines)
            log.warning("record_failed", path=str(self._path), reason=error.strerror, lost=len(lines))
