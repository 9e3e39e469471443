"""Traffic made up from a seed, of kinds that the recorded traces are not.

    chat     people: one of 40 system prompts, few of them common; some turns with half a minute between them
    agents   programs: one of 6 long prompts with tools; many turns, seconds apart, each with a tool's answer
    files    questions on one of 400 long documents, few of them common; one turn, nothing else shared

Rule: a turn's prompt is all that was said before in its session, the earlier answers too, and something new. Lengths
are log-normal, times between turns and sessions exponential, the choice of a prompt or document Zipf's. The same seed
gives the same requests everywhere. What answers bring to a cache is not modelled: in a replay nobody asks for an
answer's own blocks, so the turn after computes them once.
Pure.
"""

import random
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from deploy.replay_trace import Arrival

PART_TOKENS = 64
NAME_BYTES = 4
MOST_PROMPT_TOKENS = 60_000
LEAST_TOKENS, MOST_TIMES = 8, 8  # of a length: no less, and no more times its median


class Kind(NamedTuple):
    """Medians of lengths in tokens, means of times in seconds."""

    sessions_per_s: float
    openings: int  # how many different beginnings there are
    opening_tokens: float
    popularity: float  # Zipf's exponent
    turns: float  # mean of a geometric number
    pause_s: float
    said_tokens: float  # by whoever asks
    answer_tokens: float


KINDS: Mapping[str, Kind] = {
    "chat": Kind(1.2, 40, 1200, 1.1, 6.0, 30.0, 120, 250),
    "agents": Kind(0.3, 6, 6000, 0.8, 15.0, 4.0, 900, 150),
    "files": Kind(5.0, 400, 12_000, 1.0, 1.0, 0.0, 150, 300),
}


def synthetic(kind: str, requests: int, seed: int = 0, speed: float = 1.0) -> list[Arrival]:
    """So many requests of this kind in order of time, from second 0, `speed` times as fast. Raises ValueError."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind of traffic {kind!r}: use one of {', '.join(KINDS)}")
    if requests < 1:
        raise ValueError(f"{requests} requests are none: ask for 1 or more")
    rng = random.Random(f"{kind} {seed}")
    made = KINDS[kind]
    shares = list(accumulate(1 / rank ** made.popularity for rank in range(1, made.openings + 1)))
    openings = [_Text(0, number) for number in range(made.openings)]
    for opening in openings:
        opening.grow(_length(rng, made.opening_tokens))
    arrivals: list[Arrival] = []
    begins_s = 0.0
    session = 0
    # sessions overlap: those that begin later may still have a turn before the last one wanted
    while len(arrivals) < requests or begins_s < sorted(arrival.at_s for arrival in arrivals)[requests - 1]:
        begins_s += rng.expovariate(made.sessions_per_s)
        session += 1
        opening = rng.choices(openings, cum_weights=shares)[0]
        arrivals += _session(rng, made, begins_s, opening, _Text(session, 0))
    arrivals.sort(key=lambda arrival: arrival.at_s)
    start_s = arrivals[0].at_s
    return [arrival._replace(at_s=(arrival.at_s - start_s) / speed) for arrival in arrivals[:requests]]


def _session(rng: random.Random, kind: Kind, at_s: float, opening: "_Text", own: "_Text") -> Iterator[Arrival]:
    """One conversation from its first turn to its last, or to the longest prompt."""
    while True:
        own.grow(_length(rng, kind.said_tokens))
        answer_tokens = _length(rng, kind.answer_tokens)
        # the opening's last part may be half full: whole parts are shared, the rest goes with what follows
        prompt_tokens = opening.whole_tokens + own.tokens
        if prompt_tokens > MOST_PROMPT_TOKENS:
            return
        yield Arrival(at_s, prompt_tokens, answer_tokens, (*opening.whole_parts, *own.whole_parts), PART_TOKENS)
        if rng.random() < 1 / kind.turns:
            return
        own.grow(answer_tokens)
        at_s += rng.expovariate(1 / kind.pause_s)


class _Text:
    """Something that only grows, as names of its parts."""

    def __init__(self, session: int, number: int) -> None:
        self.tokens = 0
        self._name = (session << 12 | number).to_bytes(NAME_BYTES, "little")

    def grow(self, tokens: int) -> None:
        self.tokens += tokens

    @property
    def whole_parts(self) -> Iterator[bytes]:
        """A name for each part that is full."""
        return (self._name + number.to_bytes(NAME_BYTES, "little") for number in range(self.tokens // PART_TOKENS))

    @property
    def whole_tokens(self) -> int:
        return self.tokens // PART_TOKENS * PART_TOKENS


def _length(rng: random.Random, median: float) -> int:
    return int(min(max(rng.lognormvariate(0.0, 0.7) * median, LEAST_TOKENS), MOST_TIMES * median))
