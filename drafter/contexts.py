"""The streams a drafter follows, each as its worker told it.

Rules:
- A worker numbers its `Follow` messages. One that comes again is ignored; a gap means that commits are missing, and
  then every stream of that worker is dropped: a guess from a wrong text is worth nothing.
- A stream starts with `Open`, which carries everything so far, also when it is known already. A `Commit` for an unknown
  stream is ignored, and one that does not begin where the stream ended, by length or by digest, drops it.
- A worker opens its streams again for a drafter whose status shows a new epoch. So a drafter that lost streams raises
  its epoch (`lost` says when), and the worker needs no other way to be asked.
- Streams past `max_contexts` and tokens past `max_tokens` push out the streams heard of longest ago; nobody is told,
  and those streams go on without drafts.
- What is said of streams goes on to whoever drafts as `news`, in order.
Pure.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from drafter.drafting import Key, Stream
from shared.messages import Close, Commit, Follow, Open
from shared.tokens import count, digest, unpack


class Context:
    """One stream: how far it is, the proposal that waits to be judged, and how proposals did so far."""

    def __init__(self, key: Key, opened: Open, opened_at: float, epoch: int = 0, zone: str = "",
                 lead_tokens: int = 0) -> None:
        self.key = key
        self.epoch = epoch  # of its worker
        self.zone = zone  # that its worker said it is in; empty: it did not
        self.lead_tokens = lead_tokens  # by so many it has gone on when a proposal arrives
        self.tenant = opened.tenant
        self.max_draft_tokens = opened.max_draft_tokens
        self.traceparent = opened.traceparent
        self.opened_at = opened_at
        self.length = count(opened.tokens)
        self.digest = digest(opened.tokens)
        self.proposed_tokens = 0
        self.judged_tokens = 0  # of those proposed, the ones that met the real token
        self.right_tokens = 0
        self._guess: list[int] = []
        self._asked: tuple[int, int] = (self.length, self.digest)  # length and digest when a proposal was asked for
        self._since: list[int] = []  # what came since then

    def __len__(self) -> int:
        return self.length

    def commit(self, tokens: Sequence[int], packed: bytes) -> None:
        """The stream went on. Judges the guess: a right token each, up to the first wrong one."""
        self.length += len(tokens)
        self.digest = digest(packed, self.digest)
        self._since += tokens
        met = 0
        for token, guessed in zip(tokens, self._guess, strict=False):
            met += 1
            self.judged_tokens += 1
            if token != guessed:
                self._guess = []
                return
            self.right_tokens += 1
        self._guess = self._guess[met:]

    def ask(self) -> None:
        """A proposal is asked for; the stream may go on while it is made."""
        self._asked, self._since = (self.length, self.digest), []

    def digest_at(self, base: int) -> int | None:
        """The digest of the text as it was when a proposal was asked for; None if that was not `base` tokens."""
        return self._asked[1] if base == self._asked[0] else None

    def still_open(self, tokens: Sequence[int]) -> bool:
        """Whether the text may still go on as proposed with `tokens` behind what it was when that was asked for."""
        met = len(self._since)
        return met < len(tokens) and list(tokens[:met]) == self._since

    def expect(self, tokens: Sequence[int]) -> None:
        """These were proposed behind the text as it was when they were asked for."""
        self._guess = list(tokens[len(self._since):])
        self.proposed_tokens += len(tokens)


class Opened(NamedTuple):
    """A stream is followed from here."""

    key: Key
    stream: Stream


class Advanced(NamedTuple):
    """A stream had `base` tokens and went on."""

    key: Key
    base: int
    tokens: list[int]


class Ended(NamedTuple):
    """A stream that is followed no longer. `why`: closed, lost, evicted, silent or failed."""

    context: Context
    why: str


News = Opened | Advanced | Ended


class Followed(NamedTuple):
    """What one message changed."""

    touched: list[Key]  # streams that are followed and stand elsewhere now
    news: list[News]


class Contexts:
    """All streams of all workers."""

    def __init__(self, max_contexts: int, max_tokens: int) -> None:
        self.gaps_total = 0
        self.diverged_total = 0  # streams that were not what their worker has
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
        news: list[News] = []
        if self._counts_on(message, news):
            for event in message.events:
                key = Key(message.worker, event.request_id, event.attempt)
                match event:
                    case Open():
                        self._open(key, event, message, now, news)
                    case Commit():
                        self._commit(key, event, message, news)
                    case Close():
                        self._evicted.pop(key, None)
                        self._end(key, "closed", news)
                touched[key] = None
        self._make_room(news)
        return Followed([key for key in touched if key in self._contexts], news)

    def get(self, key: Key) -> Context | None:
        """A stream, if it is followed."""
        return self._contexts.get(key)

    def drop_worker(self, worker: str, before_epoch: int | None = None) -> list[News]:
        """Forget a worker that fell silent, or that started again with `before_epoch`, and its streams."""
        news: list[News] = []
        if worker in self._counts and (before_epoch is None or self._counts[worker][0] < before_epoch):
            del self._counts[worker]
            self._drop_streams(worker, "silent", news)
        return news

    def drop_all(self, why: str) -> list[Ended]:
        """Forget every stream; their workers are to open them again."""
        self.lost = True
        ended = [Ended(context, why) for context in self._contexts.values()]
        self._contexts.clear()
        self._tokens = 0
        return ended

    def _counts_on(self, message: Follow, news: list[News]) -> bool:
        """Whether the message is new. Drops the worker's streams when something is missing before it."""
        epoch, seq = self._counts.get(message.worker, (message.epoch, message.seq - 1))
        if message.epoch < epoch or (message.epoch == epoch and message.seq <= seq):
            return False
        if message.epoch > epoch:
            self._drop_streams(message.worker, "lost", news)
        elif message.seq > seq + 1:
            self.gaps_total += 1
            self._drop_streams(message.worker, "lost", news)
        self._counts[message.worker] = (message.epoch, message.seq)
        return True

    def _open(self, key: Key, opened: Open, message: Follow, now: float, news: list[News]) -> None:
        known = self._contexts.get(key)
        if known is not None and (known.length, known.digest) == (count(opened.tokens), digest(opened.tokens)):
            return
        self._end(key, "lost", news)
        self._evicted.pop(key, None)
        tokens = _tokens(opened.tokens)
        if tokens is not None:
            self._contexts[key] = Context(key, opened, now, message.epoch, message.zone, message.lead_tokens)
            self._tokens += len(tokens)
            news.append(Opened(key, Stream(tokens, opened.prompt_tokens, opened.sampling,
                                           _tokens(opened.prediction) or ())))

    def _commit(self, key: Key, commit: Commit, message: Follow, news: list[News]) -> None:
        context = self._contexts.get(key)
        if context is None:
            self.lost = self.lost or key not in self._evicted
            return
        tokens = _tokens(commit.tokens)
        if tokens is None or commit.base_length != context.length or commit.digest not in (0, context.digest):
            self.lost = True
            self.diverged_total += 1
            self._end(key, "lost", news)
            return
        news.append(Advanced(key, context.length, tokens))
        context.commit(tokens, commit.tokens)
        context.lead_tokens = message.lead_tokens
        self._tokens += len(tokens)
        self._contexts.move_to_end(key)

    def _end(self, key: Key, why: str, news: list[News]) -> None:
        context = self._contexts.pop(key, None)
        if context is not None:
            self._tokens -= context.length
            news.append(Ended(context, why))

    def _drop_streams(self, worker: str, why: str, news: list[News]) -> None:
        for key in [key for key in self._contexts if key.worker == worker]:
            self._end(key, why, news)

    def _make_room(self, news: list[News]) -> None:
        while self._contexts and (len(self._contexts) > self._max_contexts or self._tokens > self._max_tokens):
            key = next(iter(self._contexts))
            self._end(key, "evicted", news)
            self._evicted[key] = None
            if len(self._evicted) > 4 * self._max_contexts:
                self._evicted.popitem(last=False)


def _tokens(packed: bytes) -> list[int] | None:
    """The token ids, or None when these bytes are none."""
    return None if len(packed) % 4 else unpack(packed)
