"""What was sent and not yet reported counts, once."""

from router.outstanding import NOTHING, Outstanding, Sent


def test_what_was_sent_counts_until_a_status_must_have_seen_it() -> None:
    outstanding = Outstanding(settle_s=0.05)
    outstanding.add("w", "r1", 1, 100, 10, now=1.0)
    outstanding.add("w", "r2", 1, 50, 5, now=1.04)
    assert outstanding.sent("w", 1.04) == Sent(2, 150, 15)
    outstanding.settle("w", now=1.06)  # r1 had time to arrive and be reported, r2 had not
    assert outstanding.sent("w", 1.06) == Sent(1, 50, 5)
    outstanding.settle("w", now=1.10)
    assert outstanding.sent("w", 1.10) == Sent(0, 0, 0)


def test_nothing_counts_for_ever() -> None:
    outstanding = Outstanding(expiry_s=2.0)
    outstanding.add("w", "r1", 1, 100, 10, now=1.0)
    assert outstanding.sent("w", 2.9) == Sent(1, 100, 10)
    assert outstanding.sent("w", 3.1) == Sent(0, 0, 0)


def test_a_request_that_did_not_arrive_is_taken_back_once() -> None:
    outstanding = Outstanding()
    outstanding.add("w", "r1", 1, 100, 10, now=1.0)
    outstanding.add("w", "r1", 2, 30, 3, now=1.0)
    outstanding.undo("w", "r1", 1)
    outstanding.undo("w", "r1", 1)
    assert outstanding.sent("w", 1.0) == Sent(1, 30, 3)


def test_workers_do_not_share_and_a_forgotten_one_has_nothing() -> None:
    outstanding = Outstanding()
    outstanding.add("a", "r1", 1, 100, 10, now=1.0)
    assert outstanding.sent("b", 1.0) == NOTHING
    outstanding.settle("b", now=9.0)
    outstanding.forget("a")
    assert outstanding.sent("a", 1.0) == NOTHING
