"""One tree of errors, told apart by code."""

import pytest

from shared import errors
from shared.errors import MillError, Overloaded, from_code

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MillError)]


def test_every_error_has_a_code_of_its_own_and_a_status():
    assert len({kind.code for kind in KINDS}) == len(KINDS)
    assert all(400 <= kind.status <= 599 for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_code_turns_back_into_its_error(kind):
    error = from_code(kind.code, "what happened", 1.5)
    assert type(error) is kind
    assert error.message == str(error) == "what happened"
    assert (error.retry_after_s, error.param) == (1.5, None)


def test_a_code_of_a_later_version_is_an_internal_error():
    error = from_code("from_a_later_version", "news")
    assert (type(error), error.status, error.retryable) == (MillError, 500, False)


def test_only_what_may_pass_is_worth_a_retry():
    assert {kind.__name__ for kind in KINDS if kind.retryable} == {
        "RateLimited", "Overloaded", "MeshUnavailable", "WorkerFailed"}


def test_the_documented_tree_is_the_real_one():
    for kind in KINDS[1:]:
        (line,) = [line for line in errors.__doc__.splitlines() if f"── {kind.__name__} " in line]
        assert str(kind.status) in line


def test_an_error_carries_its_field_and_its_delay():
    assert Overloaded("full", retry_after_s=2.0).retry_after_s == 2.0
    assert errors.BadRequest("too hot", param="temperature").param == "temperature"
