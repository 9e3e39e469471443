"""The streams a drafter follows, each as its worker told it.

Rules:
- A worker numbers its `Follow` messages. One that comes again is ignored; a gap means that commits are missing, and
  then every stream of that worker is dropped: a guess from a wrong text is worth nothing.
- A stream starts with `Open`, which carries everything so far, also when it is known already. A `Commit` for an unknown
  stream is ignored, and one that does not begin where the stream ended drops it.
- A worker opens its streams again for a drafter whose status shows a new epoch. So a drafter that lost streams raises
  its epoch (`lost` says when), and the worker needs no other way to be asked.
- Streams past `max_contexts` and tokens past `max_tokens` push out the streams heard of longest ago; nobody is told,
  and those streams go on without drafts.
Pure.
"""

from collections import OrderedDict
from typing import NamedTuple

from drafter.suffix import History, Match
from shared.messages import Close, Commit, Follow, Open
from shared.tokens import unpack

# how fast the estimates follow what happens, per token
MEMORY = 0.1
# the probability that a guessed token is right while nothing is known, from which length of its match on
FIRST_SURVIVAL = ((0, 0.5), (4, 0.7), (8, 0.85))
# a token whose proposal comes true less often than this is not worth its place in a message
LEAST_SURVIVAL = 0.05


class Key(NamedTuple):
    """One attempt at one stream, at one worker."""

    worker: str
    request_id: str
    attempt: int


class Context:
    """One stream: its text, the guess that waits to be judged, and how guesses did so far."""

    def __init__(self, key: Key, opened: Open, tokens: list[int], opened_at: float, epoch: int = 0,
                 zone: str = "") -> None:
        self.key = key
        self.epoch = epoch  # of its worker
        self.zone = zone  # that its worker said it is in; empty: it did not
        self.tenant = opened.tenant
        self.prompt_tokens = opened.prompt_tokens
        self.max_draft_tokens = opened.max_draft_tokens
        self.traceparent = opened.traceparent
        self.opened_at = opened_at
        self.history = History()
        self.history.extend(tokens)
        self.proposed_tokens = 0
        self.judged_tokens = 0  # of those proposed, the ones that met the real token
        self.right_tokens = 0
        self._survival = [survival for _, survival in FIRST_SURVIVAL]
        self._guess: list[int] = []
        self._kind = 0  # which of `FIRST_SURVIVAL` the guess is
        self._said = 0  # how much of the guess was proposed

    def __len__(self) -> int:
        return len(self.history)

    def commit(self, tokens: list[int]) -> None:
        """The stream went on. Judges the guess: a right token each, up to the first wrong one."""
        self.history.extend(tokens)
        met = 0
        for token, guessed in zip(tokens, self._guess, strict=False):
            right = token == guessed
            self._survival[self._kind] += MEMORY * (right - self._survival[self._kind])
            if met < self._said:
                self.judged_tokens += 1
                self.right_tokens += right
            met += 1
            if not right:
                self.expect_nothing()
                return
        self._guess = self._guess[met:]
        self._said = max(0, self._said - met)

    def expect(self, match: Match) -> list[int]:
        """Take `match` as the new guess; returns as much of it as is worth proposing, maybe nothing.

        All of it is judged, so that a stream that became predictable is noticed while nothing is proposed.
        """
        self._guess = match.tokens
        self._kind = max(kind for kind, (length, _) in enumerate(FIRST_SURVIVAL) if match.length >= length)
        survival = self._survival[self._kind]
        worth, count = survival, 0
        while count < len(match.tokens) and worth >= LEAST_SURVIVAL:
            worth *= survival
            count += 1
        self._said = count
        self.proposed_tokens += count
        return match.tokens[:count]

    def expect_nothing(self) -> None:
        """There is no guess."""
        self._guess, self._said = [], 0


class Ended(NamedTuple):
    """A stream that is followed no longer. `why`: closed, lost, evicted or silent."""

    context: Context
    why: str


class Followed(NamedTuple):
    """What one message changed."""

    touched: list[Key]  # streams that are followed and stand elsewhere now
    ended: list[Ended]


class Contexts:
    """All streams of all workers."""

    def __init__(self, max_contexts: int, max_tokens: int) -> None:
        self.gaps_total = 0
        self.lost = False  # a worker speaks of streams it believes are open here; the owner sets it back
        self._max_contexts = max_contexts
        self._max_tokens = max_tokens
        self._tokens = 0
        self._contexts: OrderedDict[Key, Context] = OrderedDict()  # heard of longest ago first
        self._evicted: OrderedDict[Key, None] = OrderedDict()
        self._counts: dict[str, tuple[int, int]] = {}  # worker -> epoch, seq of its last message

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def tokens(self) -> int:
        """In all streams together."""
        return self._tokens

    def follow(self, message: Follow, now: float) -> Followed:
        """Take in what a worker tells. `now`: unix seconds."""
        touched: dict[Key, None] = {}
        ended: list[Ended] = []
        if self._counts_on(message, ended):
            for event in message.events:
                key = Key(message.worker, event.request_id, event.attempt)
                match event:
                    case Open():
                        self._open(key, event, message, now, ended)
                    case Commit():
                        self._commit(key, event, ended)
                    case Close():
                        self._evicted.pop(key, None)
                        self._end(key, "closed", ended)
                touched[key] = None
        self._make_room(ended)
        return Followed([key for key in touched if key in self._contexts], ended)

    def get(self, key: Key) -> Context | None:
        """A stream, if it is followed."""
        return self._contexts.get(key)

    def drop_worker(self, worker: str, before_epoch: int | None = None) -> list[Ended]:
        """Forget a worker that fell silent, or that started again with `before_epoch`, and its streams."""
        ended: list[Ended] = []
        if worker in self._counts and (before_epoch is None or self._counts[worker][0] < before_epoch):
            del self._counts[worker]
            self._drop_streams(worker, "silent", ended)
        return ended

    def _counts_on(self, message: Follow, ended: list[Ended]) -> bool:
        """Whether the message is new. Drops the worker's streams when something is missing before it."""
        epoch, seq = self._counts.get(message.worker, (message.epoch, message.seq - 1))
        if message.epoch < epoch or (message.epoch == epoch and message.seq <= seq):
            return False
        if message.epoch > epoch:
            self._drop_streams(message.worker, "lost", ended)
        elif message.seq > seq + 1:
            self.gaps_total += 1
            self._drop_streams(message.worker, "lost", ended)
        self._counts[message.worker] = (message.epoch, message.seq)
        return True

    def _open(self, key: Key, opened: Open, message: Follow, now: float, ended: list[Ended]) -> None:
        tokens = _tokens(opened.tokens)
        known = self._contexts.get(key)
        if known is not None and tokens is not None and known.history.tokens.tolist() == tokens:
            return
        self._end(key, "lost", ended)
        self._evicted.pop(key, None)
        if tokens is not None:
            self._contexts[key] = Context(key, opened, tokens, now, message.epoch, message.zone)
            self._tokens += len(tokens)

    def _commit(self, key: Key, commit: Commit, ended: list[Ended]) -> None:
        context = self._contexts.get(key)
        if context is None:
            self.lost = self.lost or key not in self._evicted
            return
        tokens = _tokens(commit.tokens)
        if tokens is None or commit.base_length != len(context):
            self.lost = True
            self._end(key, "lost", ended)
            return
        context.commit(tokens)
        self._tokens += len(tokens)
        self._contexts.move_to_end(key)

    def _end(self, key: Key, why: str, ended: list[Ended]) -> None:
        context = self._contexts.pop(key, None)
        if context is not None:
            self._tokens -= len(context)
            ended.append(Ended(context, why))

    def _drop_streams(self, worker: str, why: str, ended: list[Ended]) -> None:
        for key in [key for key in self._contexts if key.worker == worker]:
            self._end(key, why, ended)

    def _make_room(self, ended: list[Ended]) -> None:
        while self._contexts and (len(self._contexts) > self._max_contexts or self._tokens > self._max_tokens):
            key = next(iter(self._contexts))
            self._end(key, "evicted", ended)
            self._evicted[key] = None
            if len(self._evicted) > 4 * self._max_contexts:
                self._evicted.popitem(last=False)


def _tokens(packed: bytes) -> list[int] | None:
    """The token ids, or None when these bytes are none."""
    return None if len(packed) % 4 else unpack(packed)
