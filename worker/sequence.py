"""One stream as the scheduler sees it: its tokens, how many of them are computed, and the blocks they lie in.

Rule: `computed` chases `len(tokens)`. Prefill, decode, verification and the return from preemption are all the same
statement: the KV of positions `computed`, `computed + 1`, ... is still to come.
Pure.
"""

from typing import NamedTuple

from shared.blocks import block_hash
from shared.messages import Generate
from shared.tokens import pack, unpack
from worker.adjust import Adjuster
from worker.grammar import GrammarState
from worker.pooling import Pooling


class Key(NamedTuple):
    """Names one attempt at one request; never reused."""

    request_id: str
    attempt: int


class Sequence:
    """Mutable state of one attempt. Times are monotonic seconds, lengths are tokens."""

    __slots__ = (
        "accepted_counts", "accepted_drafts", "adjuster", "admitted_at", "arrived_at", "blocks", "cached_tokens",
        "computed", "deadline", "drafted", "drafter", "drafter_s", "drafter_usd", "end_length", "ended",
        "first_token_at", "hashes", "key", "late_drafts", "lease", "luck", "order", "pooling", "preemptions",
        "prompt_length", "rank", "request", "resumed_length", "saved_s", "scored", "slot", "steps", "stop_ids",
        "stored", "tokens", "traceparent", "verified_from", "verified_until", "verifying_steps",
        "worker_s",
    )

    def __init__(self, request: Generate, tokens: list[int], prompt_length: int, order: int, now: float,
                 deadline: float, length_limit: int) -> None:
        self.request = request
        self.key = Key(request.request_id, request.attempt)
        self.tokens = tokens  # prompt, then what was delivered
        self.prompt_length = prompt_length
        self.resumed_length = len(tokens)  # prompt and the tokens of earlier attempts
        self.end_length = min(prompt_length + request.max_tokens, length_limit)
        self.stop_ids = frozenset(request.stop_token_ids)
        self.adjuster: Adjuster | None = None
        # what is wanted instead of tokens, where it is
        self.pooling = Pooling(request.pooling, len(tokens)) if request.pooling else None
        self.scored = 0  # prompt tokens of which was told how likely they were
        self.order = order
        self.rank = (-request.priority, order)  # smaller goes first
        self.deadline = deadline
        self.computed = 0  # positions 0..computed-1 are in the KV cache
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []  # of full blocks, as far as they were needed; kept over preemption
        self.stored = 0  # blocks offered to the pool under their names
        self.slot = -1  # row in the device tables while running
        self.lease = 0  # new with each admission: tells a fresh owner of a slot from the one before
        self.arrived_at = now
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.cached_tokens = 0
        self.drafted = 0
        self.accepted_drafts = 0
        self.accepted_counts: dict[int, int] = {}  # drafts that agreed in a step -> how many steps
        self.late_drafts = 0
        self.luck = 1.0  # how much better or worse its drafts do than its drafter's others (`worker.survival`)
        self.saved_s = 0.0  # by drafts; below 0 when they cost more
        self.drafter = ""  # whose proposals came last
        self.drafter_s = 0.0  # that drafters worked on it
        self.drafter_usd = 0.0  # what that costs
        self.worker_s = 0.0  # its rows' part of the device's time
        self.preemptions = 0
        self.steps = 0
        self.verifying_steps = 0  # steps that had drafts of this stream in them
        self.verified_from: float | None = None
        self.verified_until: float | None = None
        self.ended = False
        self.traceparent = ""

    def name(self, index: int, block_size_tokens: int) -> bytes:
        """The chained hash of full block `index`."""
        while len(self.hashes) <= index:
            start = len(self.hashes) * block_size_tokens
            parent = self.hashes[-1] if self.hashes else b""
            block = self.tokens[start:start + block_size_tokens]
            self.hashes.append(block_hash(parent, block, self.request.cache_salt))
        return self.hashes[index]

    def content(self, index: int, block_size_tokens: int) -> bytes:
        """What block `index` must hold to be this one: its parent's name and its tokens."""
        parent = self.hashes[index - 1] if index else b""
        start = index * block_size_tokens
        return parent + pack(self.tokens[start:start + block_size_tokens])

    @property
    def delivered(self) -> int:
        """Tokens behind the prompt, those of earlier attempts included: the index of the next one."""
        return len(self.tokens) - self.prompt_length

    @property
    def scores(self) -> bool:
        """Whether it is still to be told how likely tokens of the prompt were."""
        return self.request.prompt_logprobs >= 0 and self.scored < self.prompt_length - 1

    def scored_rows(self, start: int, rows: int) -> range:
        """Of `rows` rows from position `start`, those that say how likely a prompt token is, if that is to be told."""
        if not self.scores:
            return range(0)
        return range(max(0, self.scored - start), max(0, min(rows, self.prompt_length - 1 - start)))

    @property
    def wants_rows(self) -> bool:
        """Whether rows of its prompt are wanted for what they say, so that finding them in the cache is no help."""
        return self.scores or (self.pooling is not None and self.pooling.needs_all)

    @property
    def missing(self) -> int:
        """Positions still to compute before the next token is known."""
        return len(self.tokens) - self.computed


def from_request(request: Generate, order: int, now: float, deadline: float, length_limit: int,
                 vocabulary_size: int = 0, grammar: GrammarState | None = None) -> Sequence:
    """The sequence a request asks for. `vocabulary_size` matters where it adjusts logits; `grammar` is as `generated`
    left it.

    Raises ValueError when its packed tokens are damaged.
    """
    prompt = unpack(request.tokens)
    sequence = Sequence(request, prompt + unpack(request.generated), len(prompt), order, now, deadline, length_limit)
    if request.adjust is not None or grammar is not None:
        sequence.adjuster = Adjuster(request, len(prompt), vocabulary_size, grammar)
    return sequence
