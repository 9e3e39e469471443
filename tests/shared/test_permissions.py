"""Each role may do on the bus what its code does, and nothing else."""

import pytest

from shared import subjects
from shared.permissions import ROLES, Principal, permissions, principal, table
from shared.subject_index import matches


def allowed(patterns: tuple[str, ...], subject: str, queue: str = "") -> bool:
    """As nats-server decides: a pattern with a queue allows only members of that queue."""
    return any(matches(pattern.partition(" ")[0], subject) and pattern.partition(" ")[2] in ("", queue)
               for pattern in patterns)


@pytest.mark.parametrize("role", ROLES)
def test_nobody_may_listen_to_everything(role):
    heard = permissions(Principal(role, "eu" if role in ("worker", "drafter") else "")).subscribe
    assert not any(pattern in (">", "*", f"{subjects.PREFIX}.>", "_INBOX.>") for pattern in heard)


def test_a_worker_or_drafter_hears_what_is_under_a_policy_in_its_own_zone_alone():
    worker = permissions(principal("worker@eu-north1")).subscribe
    drafter = permissions(principal("drafter@eu-north1")).subscribe
    for zone in ("us", "eu", "eu-north1-a", "eu-north2"):
        assert not allowed(worker, subjects.worker_generate("w", zone))
        assert not allowed(worker, subjects.worker_drafts("w", zone))
        assert not allowed(drafter, subjects.drafter_follow("d", zone))
    assert allowed(worker, subjects.worker_generate("w", "eu-north1"))
    assert allowed(worker, subjects.worker_drafts("w", "eu-north1"))
    assert allowed(drafter, subjects.drafter_follow("d", "eu-north1"))


def test_a_credential_with_an_id_holds_for_that_id_alone():
    worker = permissions(principal("worker.w7@eu"))
    assert allowed(worker.subscribe, subjects.worker_generate("w7", "eu"))
    assert not allowed(worker.subscribe, subjects.worker_generate("w8", "eu"))
    assert not allowed(worker.subscribe, subjects.worker_generate("w8"))
    assert allowed(worker.publish, subjects.status("worker", "w7"))
    assert not allowed(worker.publish, subjects.status("worker", "w8"))
    gateway = permissions(principal("gateway.g1"))
    assert allowed(gateway.subscribe, subjects.replies("g1")) and not allowed(gateway.subscribe, subjects.replies("g2"))


def test_a_router_hears_requests_only_as_one_of_its_queue():
    heard = permissions(principal("router")).subscribe
    assert allowed(heard, subjects.generate("m"), subjects.ROUTER_QUEUE)
    assert not allowed(heard, subjects.generate("m")) and not allowed(heard, subjects.generate("m"), "mine")


def test_an_observer_says_nothing():
    assert permissions(principal("observer")).publish == ("_INBOX.observer.>",)


@pytest.mark.parametrize(("text", "name"), [("gateway", "gateway"), ("worker", "worker@local"),
                                            ("worker@EU-north1", "worker@eu-north1"), ("router.r1", "router.r1"),
                                            ("drafter.d2@us", "drafter.d2@us")])
def test_a_principal_is_read_as_it_is_written(text, name):
    assert principal(text).name == name and principal(name) == principal(text)


@pytest.mark.parametrize(("text", "what"), [("miller", "begins with no role"), ("", "begins with no role"),
                                            ("gateway@eu", "only worker and drafter"), ("worker@", "no zone"),
                                            ("worker@eu.>", "no zone"), ("worker.A*@eu", "cannot be an id"),
                                            ("observer.o1", "no name")])
def test_what_is_no_principal_is_refused(text, what):
    with pytest.raises(ValueError, match=what):
        principal(text)


def test_the_table_has_a_row_for_every_role():
    assert [line.split("|")[1].strip() for line in table()[2:]] == list(ROLES)
