"""What drafts brought one request: for its client in vLLM's shape, for its receipt, and for who sums it up.

Rules: the names and meanings of `Speculation` down to `num_spec_tokens` are vLLM's, which benchmark tools read; what
stands behind them is ours. Like vLLM this is said of requests with one stream only: figures of several do not add up.
Of a stream that moved to another worker it is what the last one did. Where the gateway itself ends a stream, at a stop
string, it waits a moment for the worker's last word on it: the figures are then those of all that the worker did, some
tokens beyond the answer included.
Pure.
"""

from msgspec import Struct

from shared.messages import Finished


class Speculation(Struct, frozen=True):
    """`metrics.speculative_decoding` of an answer. Counts in tokens, but for steps."""

    mean_acceptance_length: float  # tokens of a step that verified drafts
    draft_acceptance_rate: float
    acceptance_histogram: list[int]  # place j: steps in which j drafts agreed
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int  # most drafts of a step
    late_draft_tokens: int  # proposed for places that were taken when they came
    time_saved_ms: float  # verification and waits taken off; below 0: lost
    drafter_ms: float  # that it worked on this request
    drafter_usd: float  # what that costs
    drafter: str


class RequestMetrics(Struct, frozen=True):
    """`metrics` of an answer, with vLLM's names."""

    time_to_first_token_ms: float  # from when the worker took it up
    generation_time_ms: float  # from the first token to the last
    queue_time_ms: float
    mean_itl_ms: float | None  # of a stream that moved nobody knows the time of all its tokens
    tokens_per_second: float | None
    speculative_decoding: Speculation


def speculation_of(end: Finished) -> Speculation | None:
    """What drafts brought a stream; None when no drafter worked on it, or its worker does not say."""
    if not end.drafter or not end.accepted_counts:
        return None
    steps, drafted, accepted = end.draft_steps, end.draft_tokens, end.accepted_draft_tokens
    return Speculation(
        1.0 + accepted / steps if steps else 1.0, accepted / drafted if drafted else 0.0, list(end.accepted_counts),
        steps, accepted, drafted, len(end.accepted_counts) - 1, end.late_draft_tokens,
        round(1000 * end.draft_saved_s, 3), round(1000 * end.drafter_s, 3), end.drafter_usd, end.drafter)


def metrics_of(end: Finished) -> RequestMetrics | None:
    """The `metrics` of an answer with one stream; None where no drafter worked on it."""
    speculation = speculation_of(end)
    if speculation is None:
        return None
    tokens = end.completion_tokens if end.attempt == 1 else 0
    return RequestMetrics(
        _ms(end.prefill_s), _ms(end.decode_s), _ms(end.queue_s),
        _ms(end.decode_s / (tokens - 1)) if tokens > 1 else None,
        round(tokens / end.decode_s, 3) if tokens and end.decode_s > 0 else None, speculation)


def accepted_at(end: Finished) -> list[int]:
    """How many drafts were accepted at the first, the second, ... place of a draft."""
    counts = end.accepted_counts
    return [sum(counts[place + 1:]) for place in range(len(counts) - 1)]


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)
