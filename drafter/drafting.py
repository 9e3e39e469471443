"""The seam between the drafter service and each way of drafting.

    service  --open, advance, close-->  Draftsman     what streams say
             --propose(asks)-------->                 how they may go on: Continuations

Rules:
- All calls come one at a time. `open`, `advance` and `close` only take note; what costs time (a model's prefill) is
  done in `propose`, within its budget. A draftsman with `threaded` set is called in a thread of its own, so that the
  service hears meanwhile; what was heard comes before the next `propose`.
- The service speaks only of streams that it opened, and every `advance` begins where the stream ended.
- A continuation is a guess. A worker verifies it by sampling, so a draftsman may forget, cut short, or say nothing.
- Continuations of one stream are told apart by `assumed`: with none it is the likeliest one, if that is worth saying;
  `assumed` names an outcome of the steps under way (`drafter.outcomes`): so many tokens of the likeliest one, then
  another token.
Pure.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from shared.messages import Sampling


class Key(NamedTuple):
    """One attempt at one stream, at one worker."""

    worker: str
    request_id: str
    attempt: int


class Audience(NamedTuple):
    """Who may see a text."""

    tenant: str
    model: str
    zone: str


class Stream(NamedTuple):
    """A stream as it stands when it is opened."""

    tokens: Sequence[int]  # prompt, then what was said so far
    prompt_tokens: int = 0
    sampling: Sampling = Sampling()
    prediction: Sequence[int] = ()  # what its client expects it to say


class Ask(NamedTuple):
    """A stream whose continuation is wanted. Counts in tokens."""

    key: Key
    length: int  # of the likeliest continuation, and of each one behind its condition
    lead: int = 0  # the stream will have gone on by about so many when the answer arrives
    branches: int = 0  # continuations under a condition, at most
    audience: Audience | None = None  # whose recent texts may be used; none while that is not known


class Continuation(NamedTuple):
    """If the stream goes on with `assumed` behind its first `base` tokens, then `tokens` are likely next."""

    key: Key
    base: int
    assumed: Sequence[int]
    tokens: Sequence[int]
    confidence: Sequence[float]  # of each of `tokens`: how likely it is right when all before it were
    likely: float = 1.0  # that the stream goes on with `assumed`


class Draftsman(Protocol):
    """One way of drafting, for all streams of all workers."""

    kind: str
    vocabulary: str  # digest of the ids it speaks; empty: any
    threaded: bool

    @property
    def behind(self) -> Collection[Key]:
        """Streams that it has not taken in to their end, for want of time: they are asked for again when there is."""

    def open(self, key: Key, stream: Stream) -> None:
        """Follow this stream from here; one known under this key is forgotten."""

    def advance(self, key: Key, base: int, tokens: Sequence[int]) -> None:
        """The stream had `base` tokens and now these follow."""

    def close(self, key: Key, audience: Audience | None) -> None:
        """Forget this stream. `audience`: who may be told what it said; none: nobody."""

    def propose(self, asks: Sequence[Ask], budget_s: float) -> list[Continuation]:
        """How these streams may go on, in at most about `budget_s` seconds of work (infinite: no limit).

        Streams are worked on together. Of one stream the continuation without condition comes first; nothing is said
        of a stream of which nothing is known.
        """
