"""What happened to requests and their streams, in the scheduler's words, and the last word on each."""

from typing import Literal, NamedTuple

from shared.errors import MillError
from shared.messages import Failed, Finished, Generate
from worker.sequence import Sequence


class Registered(NamedTuple):
    """A request became a sequence; so many of its tokens lie in the cache now."""

    sequence: Sequence
    cached_tokens: int


class Started(NamedTuple):
    """A sequence was admitted for the first time."""

    sequence: Sequence


class Advanced(NamedTuple):
    """Committed: the stream's tokens number `first`, `first + 1`, ..."""

    sequence: Sequence
    first: int
    tokens: list[int]
    logprobs: bytes = b""  # packed records, where asked for


class PromptScored(NamedTuple):
    """How likely the prompt's tokens number `first`, `first + 1`, ... were."""

    sequence: Sequence
    first: int
    logprobs: bytes


class Ended(NamedTuple):
    """The last word on a sequence."""

    sequence: Sequence
    reply: Finished | Failed


class Refused(NamedTuple):
    """The last word on a request that never became a sequence."""

    request: Generate
    reply: Finished | Failed


class Heard(NamedTuple):
    """A request that is to become a sequence, but not soon."""

    request: Generate


Event = Registered | Started | Advanced | PromptScored | Ended | Refused | Heard


def finished(sequence: Sequence, reason: Literal["stop", "length", "cancelled"], now: float,
             max_draft_tokens: int) -> Finished:
    """The message that an end is, with what the stream took and what drafts brought it."""
    admitted = now if sequence.admitted_at is None else sequence.admitted_at
    first = now if sequence.first_token_at is None else sequence.first_token_at
    return Finished(
        sequence.key.request_id, sequence.key.attempt, reason,
        prompt_tokens=sequence.prompt_length, cached_tokens=sequence.cached_tokens,
        completion_tokens=sequence.delivered, draft_tokens=sequence.drafted,
        accepted_draft_tokens=sequence.accepted_drafts, queue_s=admitted - sequence.arrived_at,
        prefill_s=first - admitted, decode_s=now - first, draft_steps=sequence.verifying_steps,
        accepted_counts=tuple(sequence.accepted_counts.get(count, 0)
                              for count in range(max_draft_tokens + 1)) if sequence.drafter else (),
        late_draft_tokens=sequence.late_drafts, draft_saved_s=sequence.saved_s, drafter=sequence.drafter,
        drafter_s=sequence.drafter_s, drafter_usd=sequence.drafter_usd, worker_s=sequence.worker_s,
        embedding=sequence.pooling.embedding() if sequence.pooling is not None and reason == "stop" else b"")


def failed(request: Generate, error: MillError, retryable: bool | None = None) -> Failed:
    """The message that an error is; `retryable` where it differs from the error's kind."""
    return Failed(request.request_id, request.attempt, error.code, error.message,
                  error.retryable if retryable is None else retryable, error.retry_after_s or 0.0)
