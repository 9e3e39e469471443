"""Traces of traffic: when a request came, how long it was, and which blocks of it others share. Never its text.

Two formats, one JSON object a line, told apart by their fields:

    Mooncake   {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [id of each 512 tokens]}
    ours       {"at_s": s, "prompt_tokens": n, "output_tokens": n, "block_size_tokens": 16, "hashes": [hex, ...]}

Rule: both kinds of id name a block and all that stands before it. An id becomes tokens by repetition, so that equal ids
are equal tokens in every run, and the mesh's own hash chain does the rest: any block size cuts them. The last Mooncake
id may stand for less than 512 tokens; tokens behind our last full block are the request's own.
Pure.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shared.blocks import hash_chain, join_hashes
from shared.tokens import unpack

MOONCAKE_BLOCK_TOKENS = 512
TOKEN_BYTES = 4
# ids from here on are nobody's: what a request says, and the end of a prompt that no hash names
FIRST_OWN_TOKEN = 1 << 31


class BadTrace(ValueError):
    """A line that is no request, by its number."""


class Arrival(NamedTuple):
    """One request. `parts` are packed tokens, each repeated to `part_tokens`."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    parts: tuple[bytes, ...]
    part_tokens: int

    def prompt(self, own_token: int) -> bytes:
        """The packed tokens; those that no part covers are `own_token`."""
        known = b"".join(part * (self.part_tokens * TOKEN_BYTES // len(part)) for part in self.parts)
        size = self.prompt_tokens * TOKEN_BYTES
        return known[:size] + own_token.to_bytes(TOKEN_BYTES, "little") * ((size - len(known)) // TOKEN_BYTES)


class Trace:
    """Arrivals in order, cut into blocks of one size. Hash chains are made when first asked for, and kept."""

    def __init__(self, arrivals: Sequence[Arrival], block_size_tokens: int) -> None:
        self.arrivals = arrivals
        self.block_size_tokens = block_size_tokens
        self._hashes: list[bytes | None] = [None] * len(arrivals)

    def prompt(self, number: int) -> bytes:
        """Packed tokens of request `number`."""
        return self.arrivals[number].prompt(FIRST_OWN_TOKEN + number)

    def hashes(self, number: int) -> bytes:
        """Joined hashes of the full blocks of request `number`, as the mesh computes them."""
        known = self._hashes[number]
        if known is None:
            chain = hash_chain(unpack(self.prompt(number)), b"", self.block_size_tokens)
            known = self._hashes[number] = join_hashes(chain)
        return known


def read(path: Path, speed: float = 1.0) -> list[Arrival]:
    """The requests of a file in order of time, from second 0, `speed` times as fast. Raises BadTrace, OSError."""
    with path.open("rb") as lines:
        arrivals = parse(lines, speed)
    if not arrivals:
        raise BadTrace(f"{path} holds no request")
    return arrivals


def parse(lines: Iterable[bytes], speed: float = 1.0) -> list[Arrival]:
    """As `read`, from lines."""
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_arrival(msgspec.json.decode(line)))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise BadTrace(f"line {number} is no request of a Mooncake trace nor of ours ({error!r}): see the head "
                               "of deploy/replay_trace.py for both formats") from None
    found.sort(key=lambda arrival: arrival.at_s)
    start_s = found[0].at_s if found else 0.0
    return [arrival._replace(at_s=(arrival.at_s - start_s) / speed) for arrival in found]


def _arrival(fields: dict[str, Any]) -> Arrival:
    if "hash_ids" in fields:
        parts = tuple(int(name).to_bytes(TOKEN_BYTES, "little") for name in fields["hash_ids"])
        arrival = Arrival(fields["timestamp"] / 1000.0, int(fields["input_length"]), int(fields["output_length"]),
                          parts, MOONCAKE_BLOCK_TOKENS)
    else:
        parts = tuple(bytes.fromhex(name) for name in fields["hashes"])
        arrival = Arrival(float(fields["at_s"]), int(fields["prompt_tokens"]), int(fields["output_tokens"]),
                          parts, int(fields["block_size_tokens"]))
    if arrival.prompt_tokens < 1 or arrival.output_tokens < 1:
        raise ValueError("a prompt and an answer have one token or more")
    if any(not part or arrival.part_tokens * TOKEN_BYTES % len(part) for part in parts):
        raise ValueError("a hash must fill its block when it is repeated")
    return arrival
