"""Who lives, from what was heard."""

from hypothesis import given
from hypothesis import strategies as st

from shared.fleet import LATE_S, Fleet
from shared.messages import DrafterStatus, GatewayStatus, RouterStatus, WorkerStatus


def worker(name="w1", epoch=1, model="m", **more):
    return WorkerStatus(id=name, epoch=epoch, model=model, **more)


def test_each_kind_is_found_under_its_own_view():
    fleet = Fleet()
    for status in (worker("b"), worker("a", model="other"), DrafterStatus("d", 1), GatewayStatus("g", 1),
                   RouterStatus("r", 1), GatewayStatus("a", 1)):
        assert fleet.fold(status, 0.0)
    assert [w.id for w in fleet.workers()] == ["a", "b"]
    assert [w.id for w in fleet.workers("m")] == ["b"]
    assert fleet.models() == ["m", "other"]
    assert fleet.worker("a").model == "other" and fleet.worker("d") is None
    assert [d.id for d in fleet.drafters()] == ["d"] and fleet.drafter("d").id == "d"
    assert [g.id for g in fleet.gateways()] == ["a", "g"] and fleet.gateway("r") is None
    assert [r.id for r in fleet.routers()] == ["r"]


def test_the_latest_status_of_an_epoch_stands_and_draining_is_visible():
    fleet = Fleet()
    assert fleet.fold(worker(running=1), 0.0)
    assert not fleet.fold(worker(running=2, state="draining"), 1.0)
    assert fleet.workers("m") == [worker(running=2, state="draining")]


def test_a_new_epoch_replaces_and_a_late_status_of_the_old_one_is_ignored():
    fleet = Fleet()
    fleet.fold(worker(epoch=1, running=5), 0.0)
    assert fleet.fold(worker(epoch=2, running=0), 1.0)
    assert not fleet.fold(worker(epoch=1, running=6), 2.0)
    assert fleet.worker("w1") == worker(epoch=2, running=0)
    # and it did not count as a sign of life either
    assert fleet.forget_silent(3.5, 2.0) == ["w1"]


def test_whoever_is_silent_too_long_dies_and_can_come_back():
    fleet = Fleet()
    fleet.fold(worker("a"), 0.0)
    fleet.fold(worker("b"), 1.0)
    fleet.fold(GatewayStatus("g", 1), 2.5)
    assert fleet.forget_silent(2.0, 2.0) == []
    assert fleet.forget_silent(3.1, 2.0) == ["a", "b"]
    assert fleet.forget_silent(3.1, 2.0) == []
    assert fleet.workers() == [] and [g.id for g in fleet.gateways()] == ["g"]
    assert fleet.fold(worker("a"), 4.0)
    assert fleet.worker("a") is not None


def test_a_service_that_started_again_with_a_clock_set_back_is_not_ignored_for_ever():
    fleet = Fleet()
    fleet.fold(worker(epoch=1000), 0.0)
    assert not fleet.fold(worker(epoch=7), 1.0)
    assert fleet.forget_silent(3.0, 2.0) == ["w1"]
    assert not fleet.fold(worker(epoch=7), LATE_S)
    assert fleet.fold(worker(epoch=7), LATE_S + 0.5)
    assert fleet.worker("w1") == worker(epoch=7)


def test_a_dead_epoch_does_not_return_after_a_newer_one_died():
    fleet = Fleet()
    fleet.fold(worker(epoch=2), 0.0)
    fleet.forget_silent(10.0, 2.0)
    assert not fleet.fold(worker(epoch=1), 11.0)
    assert fleet.workers() == []
    assert fleet.fold(worker(epoch=2), 12.0)


def test_one_that_says_goodbye_is_gone_at_once_unless_it_started_again():
    fleet = Fleet()
    fleet.fold(worker(epoch=1), 0.0)
    fleet.forget(worker(epoch=1, state="draining"))
    assert fleet.workers() == []
    fleet.fold(worker(epoch=2), 1.0)
    fleet.forget(worker(epoch=1, state="draining"))
    assert fleet.worker("w1").epoch == 2


def test_workers_heard_lately_come_by_id_and_nobody_else():
    fleet = Fleet()
    for status, at in ((worker("c"), 5.0), (worker("a"), 4.0), (worker("b"), 3.9), (DrafterStatus("d", 1), 5.0)):
        fleet.fold(status, at)
    assert [heard.id for heard in fleet.workers_heard_since(4.0)] == ["a", "c"]


def test_silence_is_told():
    fleet = Fleet()
    fleet.fold(worker(), 1.0)
    assert fleet.silent_s(worker(), 3.0) == 2.0
    assert fleet.silent_s(worker("other"), 3.0) is None


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.floats(0, 100)), max_size=30))
def test_in_any_order_the_highest_epoch_wins(heard):
    fleet = Fleet()
    for name, epoch, now in heard:
        fleet.fold(worker(name, epoch), now)
    expected = {name: max(epoch for other, epoch, _ in heard if other == name) for name, _, _ in heard}
    assert {w.id: w.epoch for w in fleet.workers()} == expected
