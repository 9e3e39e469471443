"""What a trace tells of a decision: everything that was weighed, as attributes of its span.

Pure. `tokenmill explain` shows the same from the receipt (`router.receipts`).
"""

from collections.abc import Mapping

from router.placement import Decision, Refused
from shared import trace_names as names
from shared.messages import Generate
from shared.receipts import Receipt
from shared.telemetry import Attribute


def placed(router: str, request: Generate, decision: Decision, receipt: Receipt) -> Mapping[str, Attribute]:
    """Of a request that goes to a worker."""
    chosen = decision.chosen
    return {
        names.REQUEST_ID: request.request_id,
        names.ATTEMPT: request.attempt,
        names.ROUTER: router,
        names.WORKER: chosen.worker,
        names.PLACEMENT_POLICY: decision.policy,
        names.PLACEMENT_CACHED_TOKENS: chosen.cached_tokens,
        names.PLACEMENT_ESTIMATE_S: chosen.estimate_s,
        names.PLACEMENT_CERTAIN_TOKENS: receipt.certain_tokens,
        names.PLACEMENT_MOST_CACHED_TOKENS: receipt.most_cached_tokens,
        names.PLACEMENT_BECAUSE: receipt.because,
        names.PLACEMENT_RUNNER_UP: receipt.runner_up,
        names.PLACEMENT_CANDIDATES: [
            *(str(terms) for terms in sorted(decision.candidates, key=lambda terms: terms.cost_s)),
            *(f"{worker}: {wall}" for worker, wall in decision.turned_away.items()),
        ],
    }


def refused(router: str, request: Generate, verdict: Refused) -> Mapping[str, Attribute]:
    """Of one that goes nowhere."""
    return {
        names.REQUEST_ID: request.request_id,
        names.ATTEMPT: request.attempt,
        names.ROUTER: router,
        names.RESIDENCY: list(request.residency.zones),
        names.PLACEMENT_CANDIDATES: [f"{worker}: {wall}" for worker, wall in verdict.turned_away.items()],
    }
