"""What the waiting queue promises each tenant.

Guarantee: while a request waits, every other tenant of its priority is charged at most what its own tenant is charged
meanwhile, plus the cost of one request of each of the two. A cost is the prompt tokens that had to be computed, so
cached ones are free. Within a tenant and priority requests go in the order they came. So a request waits for a bounded
amount of work, however much others send; only a higher priority that never pauses can outlast its deadline.
"""

from collections.abc import Iterator

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages import Finished
from tests.worker.builders import BLOCK, FAR, Bench, mock_decoder, request
from worker.sequence import Sequence, from_request
from worker.waiting import WaitingQueue

TENANTS = "abcd"

moves = st.lists(st.tuples(st.sampled_from(["push", "push", "admit", "admit", "remove", "return"]),
                           st.sampled_from(TENANTS), st.integers(0, 50), st.integers(0, 2)), max_size=150)


def sequence(order: int, tenant: str, priority: int = 0) -> Sequence:
    return from_request(request(f"r{order}", tenant=tenant, priority=priority), order, 0.0, FAR, 512)


class Watched:
    """A queue, and for every waiting request what each tenant was charged since it came."""

    def __init__(self) -> None:
        self.queue = WaitingQueue()
        self.charged = dict.fromkeys(TENANTS, 0)
        self.dearest = dict.fromkeys(TENANTS, 0)
        self.since: dict[Sequence, dict[str, int]] = {}
        self.came = 0

    def push(self, tenant: str, priority: int = 0) -> Sequence:
        self.came += 1
        one = sequence(self.came, tenant, priority)
        self.queue.push(one)
        self.since[one] = dict(self.charged)
        return one

    def admit(self, cost: int) -> Sequence | None:
        one = self.queue.peek()
        if one is not None:
            self.queue.admit(one, cost)
            tenant = one.request.tenant
            if self.since.pop(one, None) is not None:
                self.charged[tenant] += cost
                self.dearest[tenant] = max(self.dearest[tenant], cost)
        return one

    def others_ahead(self) -> Iterator[tuple[int, int]]:
        """For each waiting request and other tenant: how far that one is ahead since, and how far it may be."""
        for one, then in self.since.items():
            own = one.request.tenant
            for other in set(TENANTS) - {own}:
                ahead = (self.charged[other] - then[other]) - (self.charged[own] - then[own])
                yield ahead, self.dearest[own] + self.dearest[other]


bursts = st.lists(st.tuples(st.sampled_from(TENANTS), st.integers(0, 12), st.integers(0, 10), st.integers(0, 50),
                            st.booleans()), max_size=20)


@settings(max_examples=300, deadline=None)
@given(bursts)
def test_no_tenant_gets_ahead_of_one_that_waits_by_more_than_a_request_of_each(
        what: list[tuple[str, int, int, int, bool]]) -> None:
    """Also not one that comes for the first time, or back after a pause: what it did not use then is no credit."""
    watched = Watched()
    for tenant, pushed, admitted, cost, gives_up in what:
        for _ in range(pushed):
            watched.push(tenant)
        for turn in range(admitted):
            watched.admit(cost // 2 if turn % 3 else cost)
            assert all(ahead <= most for ahead, most in watched.others_ahead())
        if gives_up and watched.since:
            gone = list(watched.since)[cost % len(watched.since)]
            watched.queue.remove(gone)
            del watched.since[gone]


def test_a_tenant_that_weighs_three_times_as_much_gets_three_times_as_much() -> None:
    queue = WaitingQueue()
    for order in range(80):
        tenant, weight = ("light", 1.0) if order % 2 else ("heavy", 3.0)
        queue.push(from_request(request(f"r{order}", tenant=tenant, weight=weight), order, 0.0, FAR, 512))
    order = []
    for _ in range(40):
        one = queue.peek()
        assert one is not None
        order.append(one.request.tenant)
        queue.admit(one, 10)
    assert order.count("heavy") == 30


@settings(max_examples=300, deadline=None)
@given(moves)
def test_the_queue_loses_nobody_and_goes_by_return_then_priority_then_arrival_within_a_tenant(
        what: list[tuple[str, str, int, int]]) -> None:
    watched = Watched()
    admitted: list[Sequence] = []
    returned: list[Sequence] = []
    expected: set[Sequence] = set()
    for move, tenant, cost, priority in what:
        match move:
            case "push":
                expected.add(watched.push(tenant, priority))
            case "return" if admitted:
                back = admitted.pop(cost % len(admitted))
                watched.queue.push_back(back)
                returned.append(back)
                expected.add(back)
            case "remove" if expected:
                gone = sorted(expected, key=lambda one: one.order)[cost % len(expected)]
                watched.queue.remove(gone)
                watched.since.pop(gone, None)
                expected.remove(gone)
                returned = [one for one in returned if one is not gone]
            case "admit":
                waiting = set(expected)
                one = watched.admit(cost)
                assert (one is None) == (not waiting)
                if one is None:
                    continue
                highest = max(other.request.priority for other in waiting)
                assert one.request.priority == highest
                before = [other for other in returned if other.request.priority == highest]
                if before:
                    assert one is min(before, key=lambda other: other.order)
                else:
                    assert one.order == min(other.order for other in waiting if other.request.priority == highest
                                            and other.request.tenant == one.request.tenant)
                expected.remove(one)
                returned = [other for other in returned if other is not one]
                admitted.append(one)
        assert set(watched.queue) == expected and len(watched.queue) == len(expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), min_size=10, max_size=60), st.integers(1, 3))
def test_the_scheduler_shares_by_tokens_it_had_to_compute_and_not_by_requests(
        sizes: list[tuple[bool, int]], max_running: int) -> None:
    """Tenant `a` mostly repeats one long prompt, `b` always sends something new; both always wait."""
    bench = Bench(mock_decoder(blocks=256), max_running=max_running, step_tokens=64, max_waiting=1000)
    same = list(range(10 * BLOCK))
    for number, (repeats, size) in enumerate(sizes):
        fresh = [100 + number] + [number % 90] * (size * BLOCK)
        bench.add(request(f"a{number}", same if repeats else fresh, 1, tenant="a"))
        bench.add(request(f"b{number}", [150 + number % 50, *fresh], 1, tenant="b"))
    charged, dearest = {"a": 0, "b": 0}, {"a": 0, "b": 0}
    admit = bench.scheduler.waiting.admit

    def watched(sequence: Sequence, computed_tokens: int) -> None:
        tenant = sequence.request.tenant
        charged[tenant] += sequence.missing
        dearest[tenant] = max(dearest[tenant], sequence.missing)
        admit(sequence, computed_tokens)
        if {one.request.tenant for one in bench.scheduler.waiting} == {"a", "b"}:
            assert abs(charged["a"] - charged["b"]) <= dearest["a"] + dearest["b"]

    bench.scheduler.waiting.admit = watched  # type: ignore[method-assign]
    bench.finish()
    assert len(bench.ends) == 2 * len(sizes)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(12, 30), st.lists(st.integers(1, 40), min_size=1, max_size=4),
       st.randoms(use_true_random=False))
def test_every_request_runs_though_rivals_of_its_priority_and_below_never_stop_coming(
        max_running: int, blocks: int, victims: list[int], random: object) -> None:
    bench = Bench(mock_decoder(blocks), max_running=max_running, step_tokens=max_running + 8, max_waiting=1000)
    came = 0

    def flood() -> None:
        nonlocal came
        while len(bench.scheduler.waiting) < 6 + len(victims):
            came += 1
            length = random.randint(1, 40)  # type: ignore[attr-defined]
            bench.add(request(f"rival{came}", [came % 190] * length, random.randint(1, 8),  # type: ignore[attr-defined]
                              tenant=f"rival{came % 3}", priority=-(came % 2)))

    flood()
    for number, length in enumerate(victims):
        bench.add(request(f"victim{number}", [191 + number % 8] * length, 4, tenant=f"victim{number % 2}"))
    for _ in range(3000):
        flood()
        bench.step()
        if all((f"victim{number}", 1) in bench.ends for number in range(len(victims))):
            break
    for number in range(len(victims)):
        (end,) = bench.ends[f"victim{number}", 1]
        assert isinstance(end, Finished) and end.reason == "length"
