"""Every struct on the wire, one tagged union per receiver.

Rules: unknown fields are ignored and new fields have defaults, so that versions mix during a rollout; token ids and
hashes travel packed (`shared.tokens`, `shared.blocks`); one message per step per receiver, never one per token.
Pure. Encoded as msgpack maps; `tests/shared/golden/` holds the bytes.

    gateway -> router -> worker      Generate
    gateway -> router or worker      Cancel
    worker -> gateway                StepReplies of Accepted | Tokens | Scored | Finished | Failed
    router -> gateway                StepReplies of Queued | Failed
    worker -> routers                KvEvents of Stored | Removed | Cleared, KvSnapshot;
    router -> worker                 SnapshotRequest
    worker -> drafter                Follow of Open | Commit | Close
    drafter -> worker                Drafts of Proposal
    everyone -> everyone             WorkerStatus | RouterStatus | DrafterStatus | GatewayStatus
"""

from typing import Literal, TypeVar

import msgspec
from msgspec import Struct

T = TypeVar("T")


class Wire(Struct, omit_defaults=True, frozen=True, gc=False):
    """Base of all that travels: immutable, defaults left out."""


# --- a request, on its way to a worker -------------------------------------------------------------------------------


class Sampling(Wire, frozen=True):
    """How tokens are chosen. Temperature 0 is greedy. Noise is keyed by `seed` (design section 5)."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0  # unsigned 64 bit


class Adjust(Wire, frozen=True):
    """What shifts or masks logits before a token is chosen (`shared.adjust`). As it is by default it does nothing."""

    repetition_penalty: float = 1.0  # on ids of prompt and answer
    frequency_penalty: float = 0.0  # on ids of the answer, for each time
    presence_penalty: float = 0.0  # on ids of the answer, once
    biased: bytes = b""  # packed ids, each once
    biases: bytes = b""  # one little-endian float32 for each of them
    min_tokens: int = 0  # no stop token before the answer has so many
    bad_words: tuple[bytes, ...] = ()  # packed ids: the last is not chosen behind the others
    allowed: bytes = b""  # packed ids; empty: all


class Grammar(Wire, frozen=True):
    """What an answer must be. `text`: a JSON schema, a regular expression, a JSON list of strings, or a grammar."""

    kind: Literal["json", "regex", "choice", "lark"]
    text: str


class Residency(Wire, frozen=True):
    """Where a request's tokens may be. Empty `zones`: anywhere. A zone `eu` allows `eu` and `eu-north1`."""

    zones: tuple[str, ...] = ()


class Placement(Wire, frozen=True):
    """A router's decision and the reason for it."""

    router: str
    worker: str
    cached_tokens: int = 0  # what the router believes the worker holds
    estimate_s: float = 0.0  # expected seconds until the first token
    policy: str = "cost"
    certain_tokens: int = 0  # of `cached_tokens`, what the worker itself has said; the rest was only expected
    receipt: bytes = b""  # a packed `shared.receipts.Receipt`, handed through to the gateway


class Generate(Wire, frozen=True, tag="generate"):
    """One stream to produce. Immutable; a resubmission is a new attempt with `generated` filled.

    The worker continues behind `tokens + generated`; `max_tokens` counts `generated` too.
    """

    request_id: str
    attempt: int
    gateway: str
    model: str
    tokens: bytes  # prompt
    max_tokens: int
    deadline: float  # unix seconds; nobody works on it afterwards
    sampling: Sampling = Sampling()
    tenant: str = "default"
    cache_salt: bytes = b""
    block_hashes: bytes = b""  # of prompt + generated, full blocks only
    generated: bytes = b""  # tokens already delivered by earlier attempts
    stop_token_ids: tuple[int, ...] = ()
    priority: int = 0  # higher goes first
    residency: Residency = Residency()
    exclude_workers: tuple[str, ...] = ()  # they failed this request before
    cache_hint: str = ""  # prompt_cache_key: decides between equals
    placement: Placement | None = None
    recipe: str = ""  # `generated` came from this numeric recipe and goes on only under it; empty: not begun
    vocabulary: str = ""  # digest of what `tokens` are ids of; empty: not said
    tier: str = "default"  # a `shared.tiers` name
    prediction: bytes = b""  # tokens that the client expects the answer to hold
    weight: float = 1.0  # of its tenant, where tenants share what there is
    adjust: Adjust | None = None
    logprobs: int = -1  # tell how likely each token is, and so many of the likeliest; -1: do not
    prompt_logprobs: int = -1  # the same of the prompt
    grammar: Grammar | None = None
    # wanted instead of tokens: one vector for the prompt, the mean of its rows or the last; empty: tokens are wanted
    pooling: Literal["", "mean", "last"] = ""


def demands(request: Generate) -> tuple[str, ...]:
    """The abilities that a worker must name to be given `request`."""
    asked = (("adjust", request.adjust is not None), ("grammar", request.grammar is not None),
             ("logprobs", max(request.logprobs, request.prompt_logprobs) >= 0), ("embeddings", request.pooling != ""))
    return tuple(name for name, needed in asked if needed)


class Cancel(Wire, frozen=True, tag="cancel"):
    """Stop this request; every attempt up to and including `attempt`."""

    request_id: str
    attempt: int


# --- what comes back to the gateway ----------------------------------------------------------------------------------


class Accepted(Wire, frozen=True, tag="accepted"):
    """The worker has registered the request: nobody needs to send it again."""

    request_id: str
    attempt: int
    worker: str
    cached_tokens: int = 0
    receipt: bytes = b""  # of its placement, unopened


class Queued(Wire, frozen=True, tag="queued"):
    """A router holds the request until some worker has room, and says so again with each heartbeat."""

    request_id: str
    attempt: int


class Tokens(Wire, frozen=True, tag="tokens"):
    """Tokens number `index`, `index + 1`, ... of the stream (number 0 is the first after the prompt).

    A stop token is delivered like any other; the gateway shows no text for it.
    """

    request_id: str
    attempt: int
    index: int
    tokens: bytes
    logprobs: bytes = b""  # a `shared.logprobs` record for each token, where asked for


class Scored(Wire, frozen=True, tag="scored"):
    """How likely the prompt's tokens number `index`, `index + 1`, ... were; nobody knows of number 0."""

    request_id: str
    attempt: int
    index: int
    logprobs: bytes  # `shared.logprobs` records


class Finished(Wire, frozen=True, tag="finished"):
    """The last word on a stream that ended as asked. Times in seconds, counts in tokens."""

    request_id: str
    attempt: int
    reason: Literal["stop", "length", "cancelled"]
    worker: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0  # with those of earlier attempts
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    drafter: str = ""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    miss: str = ""  # why fewer tokens were cached than the router said: a `shared.receipts` class; empty: they were not
    draft_steps: int = 0  # that verified drafts of this stream
    accepted_counts: tuple[int, ...] = ()  # of these, in how many 0, 1, 2, ... drafts agreed
    late_draft_tokens: int = 0  # proposed for places that were taken when they came
    draft_saved_s: float = 0.0  # by drafts, the cost of verifying and waiting taken off; below 0: lost
    drafter_s: float = 0.0  # of the drafter's time
    drafter_usd: float = 0.0  # what that costs
    embedding: bytes = b""  # of length 1, in little-endian float32, where `pooling` asked for it
    worker_s: float = 0.0  # of the device's time: its rows' part of each step; of this attempt


class Failed(Wire, frozen=True, tag="failed"):
    """The last word on a stream that did not. `retryable`: another attempt elsewhere may succeed."""

    request_id: str
    attempt: int
    code: str  # a `shared.errors` code
    message: str
    retryable: bool = False
    retry_after_s: float = 0.0
    receipt: bytes = b""  # of a router's refusal


Reply = Queued | Accepted | Tokens | Scored | Finished | Failed


class StepReplies(Wire, frozen=True, tag="replies"):
    """All replies of one step for one gateway. `seq` counts 1, 2, ... per (sender, epoch, gateway)."""

    sender: str  # worker or router id
    epoch: int
    seq: int
    replies: tuple[Reply, ...]
    recipe: str = ""  # numeric recipe of the sender; routers have none


# --- KV events, for routers ------------------------------------------------------------------------------------------


class Stored(Wire, frozen=True, tag="stored"):
    """These blocks can be reused from now on (packed hashes)."""

    hashes: bytes


class Removed(Wire, frozen=True, tag="removed"):
    """These blocks are gone (packed hashes)."""

    hashes: bytes


class Cleared(Wire, frozen=True, tag="cleared"):
    """All blocks are gone."""


KvEvent = Stored | Removed | Cleared


class KvEvents(Wire, frozen=True, tag="kv"):
    """Changes number `seq` of one worker's cache; `epoch` is new with each start of the worker."""

    worker: str
    epoch: int
    seq: int
    events: tuple[KvEvent, ...]


class KvSnapshot(Wire, frozen=True, tag="kv_snapshot"):
    """All reusable blocks as they stood after event `seq`; in `parts` messages, numbered from 0."""

    worker: str
    epoch: int
    seq: int
    hashes: bytes
    part: int = 0
    parts: int = 1


class SnapshotRequest(Wire, frozen=True, tag="snapshot_request"):
    """A router lost count and wants a `KvSnapshot`."""

    router: str


# --- worker and drafter ----------------------------------------------------------------------------------------------


class Open(Wire, frozen=True, tag="open"):
    """Follow this stream from here: `tokens` is everything so far."""

    request_id: str
    attempt: int
    tokens: bytes
    tenant: str = "default"
    prompt_tokens: int = 0
    sampling: Sampling = Sampling()
    max_draft_tokens: int = 8
    traceparent: str = ""
    prediction: bytes = b""  # as in Generate


class Commit(Wire, frozen=True, tag="commit"):
    """The stream had `base_length` tokens (prompt included) and now these follow."""

    request_id: str
    attempt: int
    base_length: int
    tokens: bytes
    digest: int = 0  # `shared.tokens.digest` of the first `base_length` tokens; 0: not said


class Close(Wire, frozen=True, tag="close"):
    """Forget this stream."""

    request_id: str
    attempt: int


class Follow(Wire, frozen=True, tag="follow"):
    """What happened to a worker's streams in one step, for the drafter it chose."""

    worker: str
    epoch: int
    seq: int
    events: tuple[Open | Commit | Close, ...]
    zone: str = ""  # of the worker: drafts go there alone; empty: not said
    lead_tokens: int = 0  # by so many the streams had gone on when proposals arrived lately


class Proposal(Wire, frozen=True, tag="proposal"):
    """If the stream goes on with `assumed` behind `base_length`, then `tokens` are likely next."""

    request_id: str
    attempt: int
    base_length: int
    tokens: bytes
    assumed: bytes = b""
    digest: int = 0  # of the first `base_length` tokens, as in Commit; 0: not said
    # of each of `assumed` and `tokens`, a byte: 255 times how likely it is right if all before it are; empty: not said
    confidence: bytes = b""


class Drafts(Wire, frozen=True, tag="drafts"):
    """Proposals for one worker. Stale ones fall out by themselves."""

    drafter: str
    epoch: int
    proposals: tuple[Proposal, ...]
    worker_epoch: int = 0  # of the worker they are for; 0: not said
    seconds: float = 0.0  # of the drafter's time that they took


# --- status: identity, load and heartbeat ----------------------------------------------------------------------------


class WorkerStatus(Wire, frozen=True, tag="worker"):
    """A worker as others see it; twice a second and on change."""

    id: str
    epoch: int
    model: str
    state: Literal["starting", "ready", "draining"] = "ready"
    engine: str = "cpu"
    recipe: str = ""  # numeric recipe; streams move only between equals
    vocabulary: str = ""  # digest: drafter and worker must agree
    zone: str = "local"
    sku: str = "cpu"
    price_usd_per_hour: float = 0.0
    block_size_tokens: int = 16
    blocks_total: int = 0
    blocks_used: int = 0  # held by running requests
    context_length: int = 0
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0  # prompt tokens still to compute, running and waiting
    max_running: int = 0
    prefill_tok_s: float = 0.0  # measured; 0 while unknown
    step_base_s: float = 0.0  # a decode step costs base + rows * per_row
    step_row_s: float = 0.0
    decode_tok_s: float = 0.0  # over the last seconds
    kv_seq: int = 0
    replies_sent: dict[str, int] = {}  # gateway -> seq of the last StepReplies
    tokens_total: int = 0
    draft_tokens_total: int = 0
    accepted_draft_tokens_total: int = 0
    drafter: str = ""
    steps_total: int = 0
    kv_digest: bytes = b""  # of all reusable blocks behind event `kv_seq` (`shared.blocks.fold`, 16 bytes)
    parity: bytes = b""  # this start's answer to the probe of `shared.parity`
    # what becomes of drafts: on; full: none can pay in such a batch; slower, dear: the drafter does not pay and is left
    # alone for a while; empty: there is no drafter
    drafting: str = ""
    draft_steps_total: int = 0  # verifications, one for each stream and step
    # the fields of Generate that this worker keeps to and older ones ignore: adjust, logprobs, grammar, embeddings
    abilities: tuple[str, ...] = ()
    stream_tokens: float = 0.0  # said for each stream that ended, of late; 0: none has


class RouterStatus(Wire, frozen=True, tag="router"):
    """A router as others see it."""

    id: str
    epoch: int
    state: Literal["starting", "ready", "draining"] = "ready"
    placed_total: int = 0
    refused_total: int = 0
    indexed_blocks: int = 0
    held: int = 0  # requests that wait here for room at a worker
    busy: float = 0.0  # cores that its process takes, lately


class DrafterStatus(Wire, frozen=True, tag="drafter"):
    """A drafter as workers see it."""

    id: str
    epoch: int
    kind: str = "suffix"
    vocabulary: str = ""  # empty: any
    state: Literal["starting", "ready", "draining"] = "ready"
    zone: str = "local"
    following: int = 0
    proposed_total: int = 0
    busy: float = 0.0  # share of the time it works, 0 to 1
    price_usd_per_hour: float = 0.0


class GatewayStatus(Wire, frozen=True, tag="gateway"):
    """A gateway as workers see it: one that falls silent has its requests dropped."""

    id: str
    epoch: int
    state: Literal["starting", "ready", "draining"] = "ready"
    active: int = 0
    url: str = ""
    busy: float = 0.0  # cores that its process takes, lately


Status = WorkerStatus | RouterStatus | DrafterStatus | GatewayStatus
KvMessage = KvEvents | KvSnapshot

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[object, msgspec.msgpack.Decoder[object]] = {}


def encode(message: Wire) -> bytes:
    """The bytes of one message."""
    return _encoder.encode(message)


def decode(data: bytes, kind: type[T]) -> T:
    """The message behind `encode`; `kind` is a struct or a union of them.

    Raises `msgspec.DecodeError` on other bytes.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        return decoder.decode(data)  # type: ignore[return-value]
    except (UnicodeDecodeError, RecursionError) as error:  # which the library lets through
        raise msgspec.DecodeError(f"it is no message: {error}") from None
