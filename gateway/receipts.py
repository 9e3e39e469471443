"""Receipts of the last requests: what routers weighed and predicted, and what came of it.

Rules: soft and bounded, the newest `MOST` requests of this gateway; no text and no tokens; a receipt is opened only
when somebody asks, so a request costs two look-ups and the bytes. A request is found under its `x-request-id`, the id
of its response, or the number that routers and workers log, by its own tenant alone: for others it does not exist.
Pure.

    Streams.hear --Note--> Stream.notes        the receipts that came with Accepted and Failed
    Answer ends  --Outcome of each choice--> Receipts.keep
    GET /v1/requests/{id}/receipt, x-tokenmill-explain --> document, header
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec.structs import asdict

from gateway.openai.common import encode
from gateway.speculation import Speculation, speculation_of
from shared import receipts
from shared.errors import MillError
from shared.messages import Finished
from shared.receipts import Miss, Receipt, classify

MOST = 4096
# notes kept of one stream; the attempts between its first and its last ones go
MOST_NOTES = 8
HEADER_WORKERS = 4
HEADER_BYTES = 2048


class ReceiptNotFound(MillError):
    status, type, code = 404, "invalid_request_error", "receipt_not_found"


class Note(NamedTuple):
    """The receipt of one attempt, unopened, and who sent it on: the worker, or the router that refused."""

    attempt: int
    sender: str
    receipt: bytes


class Outcome(NamedTuple):
    """One choice of a request, as far as it has come. Tokens; None while unknown."""

    notes: tuple[Note, ...]
    prompt_tokens: int
    ended: str  # stop, length, cancelled, an error's code; empty while it runs
    worker: str
    attempts: int
    cached_tokens: int | None  # what the last attempt's worker found
    worker_says: str = ""  # a class of miss
    speculation: Speculation | None = None  # of the last attempt, where a drafter worked on it

    @property
    def last(self) -> Receipt | None:
        """The receipt of the last attempt, if it came."""
        if not self.notes or self.notes[-1].attempt != self.attempts:
            return None
        return receipts.unpack(self.notes[-1].receipt)


class Found(NamedTuple):
    """What was predicted, what was there, and why not more."""

    predicted_tokens: int
    cached_tokens: int
    missed_tokens: int
    miss: Miss


def outcome_of(notes: Sequence[Note], prompt_tokens: int, ended: Finished | MillError | None, worker: str,
               attempts: int, first_look_tokens: int) -> Outcome:
    """One choice. `first_look_tokens`: what the worker found when the request came, before it was admitted.

    A stream that the gateway itself ended was not told what was cached in the end: the first look counts then, if it
    was as good as predicted.
    """
    told = tuple(notes)
    if isinstance(ended, Finished) and ended.attempt == attempts and ended.reason != "cancelled":
        return Outcome(told, prompt_tokens, ended.reason, worker, attempts, ended.cached_tokens, ended.miss,
                       speculation_of(ended))
    how = ended.code if isinstance(ended, MillError) else "cancelled" if ended is not None else ""
    outcome = Outcome(told, prompt_tokens, how, worker, attempts, None)
    receipt = outcome.last
    if receipt is None or attempts > 1 or not worker or isinstance(ended, MillError):
        return outcome
    enough = first_look_tokens >= min(receipt.cached_tokens, prompt_tokens)
    return outcome._replace(cached_tokens=first_look_tokens) if enough else outcome


def found(outcome: Outcome) -> Found | None:
    """Prediction and truth of the last attempt; None while one of them is unknown."""
    receipt = outcome.last
    if receipt is None or receipt.refused or outcome.cached_tokens is None:
        return None
    predicted = min(receipt.cached_tokens, outcome.prompt_tokens)
    most = max(predicted, min(receipt.most_cached_tokens, outcome.prompt_tokens))
    miss = classify(predicted, most, outcome.cached_tokens, outcome.worker_says)
    wanted = predicted if outcome.cached_tokens < predicted else most
    return Found(predicted, outcome.cached_tokens, max(0, wanted - outcome.cached_tokens), miss)


class Kept(NamedTuple):
    """One request of a client."""

    request_id: str
    response_id: str
    model: str
    created: float  # unix seconds
    choices: tuple[Outcome, ...]
    tenant: str


class Receipts:
    """The newest requests."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # by the bare id of the response
        # clients choose these: two tenants may choose alike
        self._by_request_id: dict[tuple[str, str], str] = {}  # (tenant, request id) -> bare id

    def keep(self, kept: Kept) -> None:
        """Remember this one, and the newest of those before it."""
        bare = _bare(kept.response_id)
        self._kept[bare] = kept
        self._kept.move_to_end(bare)
        self._by_request_id[kept.tenant, kept.request_id] = bare
        while len(self._kept) > self._most:
            gone, old = self._kept.popitem(last=False)
            if self._by_request_id.get((old.tenant, old.request_id)) == gone:
                del self._by_request_id[old.tenant, old.request_id]

    def find(self, name: str, tenant: str) -> Kept:
        """One of `tenant`, by request id, response id or the number in the logs. Raises ReceiptNotFound."""
        for key in (self._by_request_id.get((tenant, name), ""), _bare(name), _bare(name).rsplit("-", 1)[0]):
            kept = self._kept.get(key)
            if kept is not None and kept.tenant == tenant:
                return kept
        raise ReceiptNotFound(f"no receipt of this request is kept here: a gateway keeps those of its last {self._most}"
                              " requests once they have ended, so ask the gateway that answered, and soon", param="id")

    def __len__(self) -> int:
        return len(self._kept)


def document(kept: Kept) -> dict[str, Any]:
    """All of it, as JSON: times in milliseconds."""
    return {
        "object": "receipt", "request_id": kept.request_id, "response_id": kept.response_id, "model": kept.model,
        "created": round(kept.created, 3),
        "choices": [_choice(index, outcome) for index, outcome in enumerate(kept.choices)],
    }


def header(outcomes: Sequence[Outcome]) -> str:
    """The first choice in a line of JSON, at most `HEADER_BYTES` of ASCII; empty when nothing is known yet."""
    if not outcomes or (receipt := outcomes[0].last) is None:
        return ""
    for most in range(HEADER_WORKERS, -1, -1):
        placed = _placed(receipt)
        placed["candidates"] = [
            {"worker": row["worker"], "cached_tokens": row["cached_tokens"], "cost_ms": row["cost_ms"]}
            for row in placed["candidates"][:most]]
        placed["filtered"] = placed["filtered"][:most]
        line = encode({**placed, **_truth(outcomes[0])}).decode()
        if len(line) <= HEADER_BYTES and line.isascii():
            return line
    return ""


def _choice(index: int, outcome: Outcome) -> dict[str, Any]:
    attempts = []
    for note in outcome.notes:
        receipt = receipts.unpack(note.receipt)
        if receipt is not None:
            attempts.append({"attempt": note.attempt, **_placed(receipt)})
    return {"index": index, "ended": outcome.ended, "worker": outcome.worker, "attempts_made": outcome.attempts,
            "prompt_tokens": outcome.prompt_tokens, **_truth(outcome), "attempts": attempts,
            "speculation": None if outcome.speculation is None else asdict(outcome.speculation)}


def _truth(outcome: Outcome) -> dict[str, Any]:
    truth = found(outcome)
    if truth is None:
        return {"actual_cached_tokens": outcome.cached_tokens, "miss": None, "missed_tokens": None}
    return {"actual_cached_tokens": truth.cached_tokens, "miss": truth.miss, "missed_tokens": truth.missed_tokens}


def _placed(receipt: Receipt) -> dict[str, Any]:
    costs = {weighed.worker: weighed.cost_us for weighed in receipt.candidates}
    margin_us = None
    if receipt.worker in costs and receipt.runner_up in costs:
        margin_us = costs[receipt.runner_up] - costs[receipt.worker]
    return {
        "router": receipt.router, "policy": receipt.policy, "worker": receipt.worker, "refused": receipt.refused,
        "because": receipt.because, "runner_up": receipt.runner_up,
        "margin_ms": None if margin_us is None else _ms(margin_us), "decision_ms": _ms(receipt.decision_us),
        "predicted_cached_tokens": receipt.cached_tokens, "certain_tokens": receipt.certain_tokens,
        "most_cached_tokens": receipt.most_cached_tokens, "considered": receipt.considered,
        "candidates": [
            {"worker": weighed.worker, "cached_tokens": weighed.cached_tokens, "cost_ms": _ms(weighed.cost_us),
             "terms_ms": {name: _ms(value) for name, value in zip(receipt.terms, weighed.terms_us, strict=False)},
             "sent_requests": weighed.sent_requests, "sent_tokens": weighed.sent_tokens,
             "price_usd_per_hour": weighed.price_usd_per_hour}
            for weighed in receipt.candidates],
        "turned_away": receipt.turned_away,
        "filtered": [{"reason": wall.reason, "count": wall.count, "workers": list(wall.workers)}
                     for wall in receipt.walls],
    }


def _ms(microseconds: int) -> float:
    return microseconds / 1000


def _bare(name: str) -> str:
    """The number behind `chatcmpl-` and `cmpl-`."""
    for prefix in ("chatcmpl-", "cmpl-", "resp_", "msg_", "embd-"):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
