"""Which zones a request may use: its tenant's policy, narrowed by what the client asks for.

Rule: a request can narrow its policy and never widen it. Several headers each narrow it: what a proxy adds holds,
whatever the client says. Pure.
"""

from collections.abc import Iterable

from shared.errors import BadRequest, NoEligibleWorker
from shared.messages import Residency, WorkerStatus
from shared.residency import allows, intersect, parse

HEADER = "x-tokenmill-residency"


def policy_of(tenants: Residency, headers: Iterable[tuple[bytes, bytes]]) -> Residency:
    """The policy of a request with these headers. Raises BadRequest for one that is none or leaves no zone."""
    policy = tenants
    for name, value in headers:
        if name != HEADER.encode():
            continue
        said = value.decode("latin-1")
        if not said.strip():
            # a variable that was never set must not mean "anywhere"
            raise BadRequest(f"{HEADER} is empty: name zones split by commas, send any, or leave it out", param=HEADER)
        try:
            narrowed = intersect(policy, parse(said))
        except ValueError as error:
            raise BadRequest(f"{HEADER}: {error}", param=HEADER) from None
        if narrowed is None:
            raise BadRequest(f"{HEADER} asks for {said.strip()}, and this request may use {', '.join(policy.zones)} "
                             "only: a header narrows the policy and cannot widen it", param=HEADER)
        policy = narrowed
    return policy


def check_reachable(residency: Residency, model: str, alive: Iterable[WorkerStatus],
                    remembered: Iterable[WorkerStatus]) -> None:
    """Raises NoEligibleWorker when workers of `model` live and none, of late either, is where the policy allows.

    With nobody alive it is not the policy that stands in the way: routers say what does.
    """
    zones = sorted({worker.zone for worker in alive if worker.model == model})
    if zones and not any(allows(residency, worker.zone) for worker in remembered if worker.model == model):
        raise NoEligibleWorker(
            f"no worker of {model} is where this request may go ({', '.join(residency.zones)}): there are some in "
            f"{', '.join(zones)}. Start one in an allowed zone, or allow another zone")
