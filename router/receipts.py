"""A decision as the receipt that goes with the request.

Pure. Read by `gateway.receipts`; its size is bounded by `shared.receipts`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice, repeat
from operator import attrgetter, mul

from router.placement import Candidate, Decision, Refused, Terms
from shared.blocks import BLOCK_SIZE_TOKENS
from shared.receipts import MOST_CANDIDATES, MOST_NAMES, MOST_WALLS, Receipt, Wall, Weighed

# every figure in seconds that a worker is weighed by, under its name without the unit
_FIELDS = tuple(field for field in Terms._fields if field.endswith("_s") and field != "cost_s")
_seconds: Callable[[Terms], tuple[float, ...]] = attrgetter(*_FIELDS)
TERMS = tuple(field.removesuffix("_s") for field in _FIELDS)


def receipt_of(router: str, prompt_tokens: int, decision: Decision, workers: Sequence[Candidate], decision_s: float,
               hint: str = "", block_size_tokens: int = BLOCK_SIZE_TOKENS) -> Receipt:
    """What was weighed for one request and what came of it. `workers` are those that `decide` was given."""
    chosen = decision.chosen
    ranked = sorted(decision.candidates, key=_cost)
    runner_up = next((terms for terms in ranked if terms.worker != chosen.worker), None)
    shown = ranked[:MOST_CANDIDATES]
    if all(terms.worker != chosen.worker for terms in shown):
        shown[-1] = chosen
    sent = {worker.status.id: worker for worker in workers}
    certain_tokens = min(chosen.cached_tokens, sent[chosen.worker].certain_blocks * block_size_tokens)
    return Receipt(
        router=router, policy=decision.policy, prompt_tokens=prompt_tokens, worker=chosen.worker,
        cached_tokens=chosen.cached_tokens, certain_tokens=certain_tokens,
        most_cached_tokens=max(terms.cached_tokens for terms in decision.candidates),
        because=_because(decision, ranked, hint), runner_up=runner_up.worker if runner_up else "", terms=TERMS,
        candidates=tuple([_weighed(terms, sent[terms.worker]) for terms in shown]),
        considered=len(ranked), walls=_walls(decision.turned_away), turned_away=len(decision.turned_away),
        decision_us=round(1e6 * decision_s))


def refusal_of(router: str, policy: str, prompt_tokens: int, refused: Refused, decision_s: float) -> Receipt:
    """What stood between one request and every worker."""
    return Receipt(router=router, policy=policy, prompt_tokens=prompt_tokens, walls=_walls(refused.turned_away),
                   turned_away=len(refused.turned_away), refused=refused.code, decision_us=round(1e6 * decision_s))


def _weighed(terms: Terms, worker: Candidate) -> Weighed:
    return Weighed(terms.worker, terms.cached_tokens, round(1e6 * terms.cost_s),
                   tuple(map(round, map(mul, _seconds(terms), repeat(1e6)))), worker.sent_requests,
                   worker.sent_tokens, terms.price_usd_per_hour)


def _because(decision: Decision, ranked: Sequence[Terms], hint: str) -> str:
    """What told the chosen one from the cheapest, or from those as cheap."""
    if decision.policy != "cost":
        return decision.policy
    chosen, best = decision.chosen, ranked[0]
    if chosen.worker == best.worker:
        return "cost"
    if chosen.price_usd_per_hour != best.price_usd_per_hour:
        return "price"
    if chosen.cached_tokens != best.cached_tokens:
        return "cache"
    return "hint" if hint else "chance"


def _walls(turned_away: Mapping[str, str]) -> tuple[Wall, ...]:
    """Workers by what they stood behind, the most crowded wall first."""
    behind: dict[str, list[str]] = {}
    for worker, wall in turned_away.items():
        behind.setdefault(wall, []).append(worker)
    ordered = sorted(behind.items(), key=lambda item: -len(item[1]))
    return tuple(Wall(wall, len(workers), tuple(islice(workers, MOST_NAMES)))
                 for wall, workers in ordered[:MOST_WALLS])


def _cost(terms: Terms) -> float:
    return terms.cost_s
