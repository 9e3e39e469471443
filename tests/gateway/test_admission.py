"""Places for streams: never more than there are, and an honest guess when one will be free."""

import pytest

from gateway.admission import Admission
from shared.errors import Overloaded


def test_a_request_gets_all_its_places_or_none() -> None:
    admission = Admission(4)
    admission.enter(3, 0.0)
    with pytest.raises(Overloaded) as refused:
        admission.enter(2, 0.0)
    assert admission.active == 3
    assert refused.value.retry_after_s == 1.0
    admission.enter(1, 0.0)
    admission.leave(4, 1.0)
    assert admission.active == 0


def test_retry_after_follows_the_rate_at_which_streams_end() -> None:
    admission = Admission(100)
    admission.enter(100, 0.0)
    for second in range(20):
        admission.leave(1, second / 2)
    assert admission.retry_after_s(10, 9.5) == pytest.approx(4.75, rel=0.1)
    assert admission.retry_after_s(1, 9.5) == 0.5
    assert admission.retry_after_s(10_000, 9.5) == 60.0


def test_retry_after_grows_while_nothing_ends() -> None:
    admission = Admission(10)
    admission.enter(10, 0.0)
    admission.leave(2, 1.0)
    admission.enter(2, 1.0)
    assert admission.retry_after_s(1, 30.0) > admission.retry_after_s(1, 3.0)
