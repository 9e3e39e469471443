"""The spans of a stream, recorded when it has ended: queue, prefill and decode inside one `generate`,
and inside decode the stretch of steps that verified drafts.

Rule: nothing on the way of a token; one call per stream, and a look-up where nothing is traced.
"""

from opentelemetry.trace import SpanKind

from shared import trace_names
from shared.messages import Failed, Finished
from shared.telemetry import Attribute, extract, records, span_at
from worker.sequence import Sequence


def record_stream(sequence: Sequence, last: Finished | Failed, worker: str, drafter: str, zone: str, now: float,
                  wall: float) -> None:
    """Record an ended sequence. `now` and `wall` are one moment on both clocks."""
    parent = extract({"traceparent": sequence.traceparent} if sequence.traceparent else {})
    if not records(parent):
        return

    def unix(moment: float) -> float:
        return wall - (now - moment)

    request = sequence.request
    attributes: dict[str, Attribute] = {
        trace_names.REQUEST_ID: request.request_id, trace_names.ATTEMPT: request.attempt,
        trace_names.REQUEST_MODEL: request.model, trace_names.TENANT: request.tenant,
        trace_names.WORKER: worker, trace_names.ZONE: zone,
        trace_names.USAGE_INPUT_TOKENS: sequence.prompt_length, trace_names.USAGE_OUTPUT_TOKENS: sequence.delivered,
        trace_names.CACHED_TOKENS: sequence.cached_tokens, "mill.preemptions": sequence.preemptions,
    }
    error = last.code if isinstance(last, Failed) else ""
    if isinstance(last, Finished):
        attributes[trace_names.RESPONSE_FINISH_REASONS] = [last.reason]
    context = span_at("generate", unix(sequence.arrived_at), wall, parent, attributes, SpanKind.CONSUMER, error=error)
    admitted, first = sequence.admitted_at, sequence.first_token_at
    span_at("queue", unix(sequence.arrived_at), wall if admitted is None else unix(admitted), context)
    if admitted is not None:
        span_at("prefill", unix(admitted), wall if first is None else unix(first), context)
    if first is not None:
        decode = span_at("decode", unix(first), wall, context, {"mill.steps": sequence.steps})
        if sequence.verified_from is not None and sequence.verified_until is not None:
            span_at("verify", unix(sequence.verified_from), unix(sequence.verified_until), decode, {
                "mill.steps": sequence.verifying_steps, trace_names.DRAFTER: drafter,
                trace_names.DRAFT_TOKENS: sequence.drafted,
                trace_names.DRAFT_ACCEPTED_TOKENS: sequence.accepted_drafts,
                trace_names.DRAFT_LATE_TOKENS: sequence.late_drafts, trace_names.DRAFT_SAVED_S: sequence.saved_s,
                trace_names.DRAFTER_S: sequence.drafter_s, trace_names.DRAFTER_USD: sequence.drafter_usd})
