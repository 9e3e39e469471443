"""Drafters that lie: what a broken, stale or hostile one may send, and it must not matter.

    noise     any tokens
    traps     the truth, with one token of it changed: everything up to there is right
    forgery   on the wire: other bases and digests, ids that no vocabulary has, half tokens, conditions at random,
              seconds and prices that are negative, endless or no numbers
"""

import contextlib
import math
import random
from collections.abc import Collection, Iterator, Sequence
from unittest import mock

from msgspec.structs import replace

import drafter.kinds
import drafter.service
from drafter.contexts import Context
from drafter.drafting import Ask, Audience, Continuation, Key, Stream
from drafter.suffix import SuffixDraftsman
from shared.messages import DrafterStatus, Drafts, Proposal, Wire, encode
from shared.tokens import pack
from tests.laws.plain import mock_stream
from worker.mock_decoder import MockDecoder

VOCABULARY = 2048
# nobody asks for more in a schedule, and lies about what comes later are noise
FORESEEN = 300


class Liar:
    """A draftsman that knows the truth and seldom says it."""

    kind, vocabulary, threaded = "suffix", "", False

    def __init__(self, rng: random.Random, vocabulary: int = VOCABULARY) -> None:
        self._rng = rng
        self._size = vocabulary
        self._honest = SuffixDraftsman()
        self._truth: dict[Key, list[int]] = {}
        self._length: dict[Key, int] = {}
        self._decoder = MockDecoder(blocks=64, vocabulary_size=vocabulary)

    @property
    def behind(self) -> Collection[Key]:
        return self._honest.behind

    def open(self, key: Key, stream: Stream) -> None:
        self._honest.open(key, stream)
        self._length[key] = len(stream.tokens)
        self._truth[key] = [*stream.tokens, *mock_stream(self._decoder, stream.tokens, stream.sampling, FORESEEN)]

    def advance(self, key: Key, base: int, tokens: Sequence[int]) -> None:
        self._honest.advance(key, base, tokens)
        self._length[key] = base + len(tokens)

    def close(self, key: Key, audience: Audience | None) -> None:
        self._honest.close(key, audience)
        del self._truth[key], self._length[key]

    def propose(self, asks: Sequence[Ask], budget_s: float) -> list[Continuation]:
        said = self._honest.propose(asks, budget_s)
        for ask in asks:
            for _ in range(self._rng.randint(0, 3)):
                said.append(self._noise(ask) if self._rng.random() < 0.3 else self._trap(ask))
        return said

    def _noise(self, ask: Ask) -> Continuation:
        tokens = [self._rng.randrange(self._size) for _ in range(self._rng.randint(1, 20))]
        return self._continuation(ask, tokens)

    def _trap(self, ask: Ask) -> Continuation:
        at = self._length[ask.key]
        tokens = self._truth[ask.key][at:at + self._rng.randint(1, 20)] or [1]
        if self._rng.random() < 0.8:
            wrong = self._rng.randrange(len(tokens))
            tokens[wrong] = (tokens[wrong] + self._rng.randint(1, self._size - 1)) % self._size
        return self._continuation(ask, tokens)

    def _continuation(self, ask: Ask, tokens: list[int]) -> Continuation:
        assumed = self._rng.randrange(len(tokens)) if self._rng.random() < 0.4 else 0
        return Continuation(ask.key, self._length[ask.key], tokens[:assumed], tokens[assumed:],
                            [self._rng.random()] * (len(tokens) - assumed), self._rng.random())


@contextlib.contextmanager
def lying(seed: int, vocabulary: int = VOCABULARY) -> Iterator[None]:
    """Every drafter that starts in this block lies, to workers with a mock of so many token ids."""
    rng = random.Random(f"{seed} lies")
    honest = drafter.service._proposal

    def forged(continuation: Continuation, context: Context) -> Proposal | None:
        proposal = honest(continuation, context)
        if proposal is None or rng.random() < 0.7:
            return proposal
        base, digest = proposal.base_length, proposal.digest
        tokens, assumed, confidence = proposal.tokens, proposal.assumed, proposal.confidence
        match rng.randrange(6):
            case 0:
                base += rng.choice((-1, 1, -base - 1, 7, 10**9))
            case 1:
                digest = rng.choice((0, 1, digest ^ 1))
            case 2:
                tokens = pack([rng.choice((vocabulary, 2**32 - 1)) for _ in range(3)])
            case 3:
                tokens, assumed = rng.choice(((tokens[:-1], assumed), (b"", assumed), (tokens, b"odd"), (b"", b"")))
            case 4:
                base, digest = base + rng.choice((-1, 1)), 0
            case 5:
                assumed = pack([rng.randrange(vocabulary)]) * rng.randint(0, 200)
                confidence = b"\0\xff" * rng.randint(0, 9)
        return Proposal(proposal.request_id, proposal.attempt, base, tokens, assumed, digest, confidence)

    def figure(honest: float) -> float:
        return rng.choice((honest, -1.0, 1e9, math.inf, math.nan))

    def forged_wire(message: Wire) -> bytes:
        match message:
            case Drafts() if rng.random() < 0.3:
                message = replace(message, seconds=figure(message.seconds))
            case DrafterStatus():
                message = replace(message, price_usd_per_hour=figure(message.price_usd_per_hour))
        return encode(message)

    with (mock.patch.object(drafter.kinds, "draftsman_of", lambda settings: Liar(rng, vocabulary)),
          mock.patch.object(drafter.service, "_proposal", forged),
          mock.patch.object(drafter.service, "encode", forged_wire)):
        yield
