"""The queue of a full mesh: bounded, fair by weight, in order, and honest about how long it takes."""

from collections import Counter, defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.queueing import DrainRate, FairQueue, Full, Ticket, weights_of
from shared.tiers import TIERS, Tier, shares

WEIGHTS = {"red": 3.0, "blue": 0.5}
TENANTS = ("red", "blue", "green", "grey")


def ticket(name: object, tenant: str = "red", tier: Tier = "default", cost_s: float = 1.0, **more: Any) -> Ticket[None]:
    return Ticket(str(name), None, tenant, tier, cost_s, 0.0, **{"weight": WEIGHTS.get(tenant, 1.0)} | more)


arrivals = st.lists(st.tuples(
    st.sampled_from(TENANTS), st.sampled_from(TIERS), st.floats(0.01, 5), st.integers(-2, 2), st.integers(1, 3),
    st.sampled_from("xy"), st.integers(0, 3)), max_size=60)


def served(queue: FairQueue[None]) -> list[Ticket[None]]:
    order = []
    while (turn := queue.next()) is not None:
        queue.take(turn)
        order.append(turn)
    return order


@settings(max_examples=200, deadline=None)
@given(arrivals, st.integers(1, 12))
def test_the_bound_is_never_exceeded_and_every_request_ends_once(history: list[Any], most: int) -> None:
    queue: FairQueue[None] = FairQueue(most)
    ends: Counter[str] = Counter()
    for number, (tenant, tier, cost_s, priority, places, lane, serve) in enumerate(history):
        came = ticket(number, tenant, tier, cost_s, priority=priority, places=places, lane=lane)
        before = sorted(waiting.name for waiting in queue)
        given = queue.offer(came)
        if isinstance(given, Full):
            assert sorted(waiting.name for waiting in queue) == before
            ends[came.name] += 1
        else:
            ends.update(other.name for other in given)
        for _ in range(serve if number % 3 == 0 else 0):
            if (turn := queue.next()) is not None:
                queue.take(turn)
                ends[turn.name] += 1
        assert queue.places == sum(waiting.places for waiting in queue) <= most
        assert queue.waits_before("flex", "x") == any(waiting.lane == "x" for waiting in queue)
    ends.update(turn.name for turn in served(queue))
    assert ends == Counter(str(number) for number in range(len(history)))
    assert (len(queue), queue.places) == (0, 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(TENANTS), st.sampled_from(TIERS), st.floats(0.01, 5)), min_size=2,
                max_size=80))
def test_what_two_tenants_get_while_both_wait_differs_by_no_more_than_a_request_each(sent: list[Any]) -> None:
    queue: FairQueue[None] = FairQueue(1000)
    waiting: Counter[tuple[str, Tier]] = Counter()
    largest: defaultdict[tuple[str, Tier], float] = defaultdict(float)
    for number, (tenant, tier, cost_s) in enumerate(sent):
        queue.offer(ticket(number, tenant, tier, cost_s))
        waiting[tenant, tier] += 1
        largest[tenant, tier] = max(largest[tenant, tier], cost_s)
    got: defaultdict[tuple[str, Tier], float] = defaultdict(float)
    while (turn := queue.next()) is not None:
        flow = turn.tenant, turn.tier
        if turn.tier == "flex":
            assert all(not left for (_, tier), left in waiting.items() if tier != "flex")
        queue.take(turn)
        got[flow] += turn.cost_s / weight(*flow)
        waiting[flow] -= 1
        busy = [other for other, left in waiting.items() if left and (other[1] == "flex") == (flow[1] == "flex")]
        for one in busy:
            for other in busy:
                slack = largest[one] / weight(*one) + largest[other] / weight(*other)
                assert abs(got[one] - got[other]) <= slack + 1e-9


def weight(tenant: str, tier: Tier) -> float:
    return WEIGHTS.get(tenant, 1.0) * shares(tier)


def test_a_tenant_whose_weight_changes_is_served_by_what_each_of_its_requests_was_sent_with() -> None:
    queue: FairQueue[None] = FairQueue(1000)
    for number in range(30):
        queue.offer(ticket(f"a{number}", "a", weight=1.0 if number < 10 else 4.0))
        queue.offer(ticket(f"b{number}", "b", weight=1.0))
    order = [turn.name[0] for turn in served(queue)]
    assert order[:20].count("a") == 10
    # the other twenty of `a` at four shares, beside five of `b`
    assert order[20:45].count("a") == 20


def test_who_takes_more_room_than_its_weight_gives_way_and_who_weighs_more_may_take_more() -> None:
    queue: FairQueue[None] = FairQueue(4)
    for number in range(3):
        queue.offer(ticket(f"heavy{number}", "heavy", weight=3.0))
    queue.offer(ticket("light0", "light"))
    assert queue.offer(ticket("light1", "light")) == Full(over_share=True)
    queue.drop(next(waiting for waiting in queue if waiting.tenant == "heavy"))
    queue.offer(ticket("light1", "light"))
    (gone,) = queue.offer(ticket("heavy3", "heavy", weight=3.0))
    assert isinstance(gone, Ticket) and gone.name == "light1"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.floats(0.1, 3), st.floats(0.1, 3))
def test_nobody_starves_however_much_others_send(ahead: int, own_s: float, their_s: float) -> None:
    queue: FairQueue[None] = FairQueue(1000)
    for number in range(ahead):
        queue.offer(ticket(f"own{number}", "poor", cost_s=own_s))
    elsewhere_s, number = 0.0, 0
    while queue.get(f"own{ahead - 1}") is not None:
        for tier in ("priority", "default"):
            while sum(waiting.tenant == "rich" and waiting.tier == tier for waiting in queue) < 3:
                number += 1
                queue.offer(ticket(f"their{number}", "rich", tier, their_s))  # type: ignore[arg-type]
        turn = queue.next()
        assert turn is not None
        queue.take(turn)
        elsewhere_s += turn.cost_s if turn.tenant == "rich" else 0.0
    # four shares of priority and one of default for each of its own, and a request more of both
    assert elsewhere_s <= 5 * (ahead - 1) * own_s + 2 * their_s + 5 * own_s


@settings(max_examples=200, deadline=None)
@given(arrivals)
def test_requests_of_one_tenant_and_tier_go_by_priority_then_arrival(history: list[Any]) -> None:
    queue: FairQueue[None] = FairQueue(1000)
    for number, (tenant, tier, cost_s, priority, _, _, _) in enumerate(history):
        queue.offer(ticket(number, tenant, tier, cost_s, priority=priority))
    order = served(queue)
    for tenant in TENANTS:
        for tier in TIERS:
            ranks = [turn.rank for turn in order if (turn.tenant, turn.tier) == (tenant, tier)]
            assert ranks == sorted(ranks)


@settings(max_examples=200, deadline=None)
@given(arrivals, st.sampled_from(TENANTS), st.sampled_from(TIERS), st.integers(-2, 2))
def test_what_goes_before_a_request_is_known_when_it_comes(history: list[Any], tenant: str, tier: Tier,
                                                           priority: int) -> None:
    queue: FairQueue[None] = FairQueue(1000)
    for number, (who, what, cost_s, first, _, _, serve) in enumerate(history):
        queue.offer(ticket(number, who, what, cost_s, priority=first))
        turn = queue.next()
        if serve == 3 and turn is not None:
            queue.take(turn)
    said_s = queue.ahead_s(tier, tenant, priority)
    queue.offer(ticket("new", tenant, tier, priority=priority))
    before_s = 0.0
    for turn in served(queue):
        if turn.name == "new":
            break
        before_s += turn.cost_s
    assert said_s == pytest.approx(before_s)


def test_a_tenant_that_fills_the_queue_gives_way_to_one_that_has_little_in_it() -> None:
    queue: FairQueue[None] = FairQueue(4)
    for number in range(4):
        assert queue.offer(ticket(f"big{number}", "big")) == []
    assert queue.offer(ticket("big4", "big")) == Full(over_share=False)
    given = queue.offer(ticket("small0", "small"))
    assert isinstance(given, list) and [other.name for other in given] == ["big3"]
    assert isinstance(queue.offer(ticket("small1", "small")), list)
    # two each: who comes now has the most
    assert queue.offer(ticket("small2", "small")) == queue.offer(ticket("big5", "big")) == Full(over_share=True)


def test_flex_gives_way_first_and_takes_nobodys_place() -> None:
    queue: FairQueue[None] = FairQueue(2)
    queue.offer(ticket("cheap0", "a", "flex"))
    queue.offer(ticket("cheap1", "b", "flex"))
    (gone,) = queue.offer(ticket("dear", "c"))
    assert isinstance(gone, Ticket) and gone.name == "cheap1"
    (gone,) = queue.offer(ticket("dear2", "c"))
    assert isinstance(gone, Ticket) and gone.name == "cheap0"
    assert queue.offer(ticket("cheap2", "a", "flex")) == Full(over_share=False)


def test_lanes_do_not_wait_for_each_other() -> None:
    queue: FairQueue[None] = FairQueue(10)
    queue.offer(ticket("first", lane="full"))
    queue.offer(ticket("second", lane="free"))
    turn = queue.next(blocked={"full"})
    assert turn is not None and turn.name == "second"
    assert queue.next(blocked={"full", "free"}) is None


def test_the_drain_rate_is_one_per_worker_until_it_is_measured_and_then_what_was() -> None:
    rate = DrainRate()
    assert rate.per_second(3, 0.0) == 3.0
    rate.wait(100.0)
    for tick in range(300):
        rate.serve(0.05, 100.0 + tick / 10)
    assert rate.per_second(3, 130.0) == pytest.approx(0.5, rel=1.0)
    assert rate.per_second(3, 160.0) < 0.6
    rate.rest(3, 130.0)
    assert rate.per_second(6, 500.0) == pytest.approx(2 * rate.per_second(3, 500.0))
    assert 0 < rate.per_second(3, 500.0) < 1.0


def test_requests_that_cost_next_to_nothing_do_not_make_the_next_ones_look_endless() -> None:
    rate = DrainRate()
    for crowd in range(2000):
        rate.wait(float(crowd))
        rate.serve(1e-5, crowd + 0.01)
        rate.rest(2, crowd + 0.02)
    assert rate.per_second(2, 3000.0) >= 0.25
    rate.wait(3000.0)  # and one crowd without an end
    for number in range(20_000):
        rate.serve(1e-5, 3000.0 + number / 100)
    assert rate.per_second(2, 3200.0) >= 0.25


def test_weights_are_read_from_a_setting_or_refused_with_the_way_to_write_them() -> None:
    assert weights_of("") == {}
    assert weights_of("acme=4, example=0.5") == {"acme": 4.0, "example": 0.5}
    for wrong in ("acme", "acme=", "=3", "acme=0", "acme=-1", "acme=nan", "acme=many"):
        with pytest.raises(ValueError, match="write TENANT=WEIGHT"):
            weights_of(wrong)
