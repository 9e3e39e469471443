"""Why a request went where it went, packed by a router, handed through by the worker, opened by whoever asks.

Rules: a receipt has no text, no tokens and no hashes; it is small (about 40 bytes a candidate) and never larger than
`MOST_CANDIDATES` and `MOST_WALLS` allow; one that cannot be read costs an explanation, never a request. The names of
the terms travel with it, so that routers may weigh otherwise than whoever reads.
Pure.

Classes of a miss, one for every request whose prediction and outcome are known (`classify`):

    none            as many tokens were cached as any eligible worker was thought to hold
    lost_to_load    as many as predicted; another worker had more, and was too busy
    expected        the rest was promised by a request sent before, and not computed in time
    evicted         the rest gave way while the request waited at the worker
    event_lag       the rest had gone before the request came, and the router did not know yet
    hash_mismatch   the worker calls these blocks by other names: its hashes are not the gateway's
"""

from typing import Literal

import msgspec

Miss = Literal["none", "lost_to_load", "expected", "evicted", "event_lag", "hash_mismatch"]
MISSES: tuple[Miss, ...] = ("none", "lost_to_load", "expected", "evicted", "event_lag", "hash_mismatch")
# what a worker says of a miss; the other two are seen from the receipt
WORKER_MISSES: tuple[Miss, ...] = ("expected", "evicted", "event_lag", "hash_mismatch")
MOST_CANDIDATES = 8
MOST_WALLS = 8
MOST_NAMES = 4


class Weighed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One eligible worker. Terms in microseconds, in the order of the receipt's `terms`."""

    worker: str
    cached_tokens: int
    cost_us: int
    terms_us: tuple[int, ...]
    sent_requests: int = 0  # sent there and in no status yet; their prompts are part of the queue
    sent_tokens: int = 0
    price_usd_per_hour: float = 0.0


class Wall(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Why `count` workers could not have it; a few of them by name."""

    reason: str
    count: int
    workers: tuple[str, ...]


class Receipt(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One placement, or one refusal: then `worker` is empty."""

    router: str
    policy: str
    prompt_tokens: int
    worker: str = ""
    cached_tokens: int = 0  # predicted
    certain_tokens: int = 0  # of these, what the worker had said itself
    most_cached_tokens: int = 0  # the most that any eligible worker was thought to hold
    because: str = ""  # what decided: cost, price, cache, hint, chance, or the policy
    runner_up: str = ""
    terms: tuple[str, ...] = ()
    candidates: tuple[Weighed, ...] = ()  # cheapest first; the chosen one and the runner-up always
    considered: int = 0  # candidates, those left out above too
    walls: tuple[Wall, ...] = ()
    turned_away: int = 0
    refused: str = ""  # the error code
    decision_us: int = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Receipt)


def pack(receipt: Receipt) -> bytes:
    """The bytes that travel."""
    return _encoder.encode(receipt)


def unpack(data: bytes) -> Receipt | None:
    """The receipt behind `pack`; None when there is none or it is of a kind that is not known here."""
    if not data:
        return None
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError:
        return None


def classify(predicted_tokens: int, most_cached_tokens: int, actual_tokens: int, worker_says: str) -> Miss:
    """Why `actual_tokens` of the prompt were cached and not more."""
    if actual_tokens < predicted_tokens:
        for miss in WORKER_MISSES:
            if worker_says == miss:
                return miss
        return "event_lag"  # a worker that does not say: the router's picture was not its cache
    return "lost_to_load" if actual_tokens < most_cached_tokens else "none"
