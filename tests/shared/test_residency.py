"""A wall is a wall: what a policy allows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.messages import Residency
from shared.residency import MAX_ZONES, allows, intersect, parse

words = st.sampled_from(["eu", "us", "e", "north1", "a"])
zones = st.lists(words, min_size=1, max_size=3).map("-".join)
policies = st.lists(zones, max_size=3).map(lambda found: Residency(tuple(found)))


@pytest.mark.parametrize(("policy", "zone", "allowed"), [
    ((), "anywhere", True), ((), "", True), (("eu",), "eu", True), (("eu",), "eu-north1", True),
    (("eu",), "eu-north1-a", True), (("eu",), "europe", False), (("eu",), "us", False), (("eu",), "", False),
    (("eu-north1",), "eu", False), (("eu-north1",), "eu-north10", False), (("EU",), "eu-North1", True),
    (("us", "eu"), "eu-west", True), (("eu",), "us-eu", False),
])
def test_a_policy_allows_what_lies_inside_its_zones(policy, zone, allowed):
    assert allows(Residency(policy), zone) is allowed


@pytest.mark.parametrize(("text", "expected"), [
    ("", ()), ("  ", ()), ("any", ()), ("eu", ("eu",)), (" EU , us-east1 ", ("eu", "us-east1")), ("eu,EU", ("eu",)),
])
def test_policies_are_read(text, expected):
    assert parse(text) == Residency(expected)


@pytest.mark.parametrize("text", [",", "eu,", "eu;us", "eu*", "eu-", "-eu", "eu--north", "e u", "eu.north", "any,eu."])
def test_what_is_no_policy_is_refused_and_never_read_as_anywhere(text):
    with pytest.raises(ValueError, match="is no zone"):
        parse(text)


def test_a_policy_is_bounded():
    with pytest.raises(ValueError, match="at most 32"):
        parse(",".join(f"z{n}" for n in range(MAX_ZONES + 1)))


@given(policies, policies, zones)
def test_the_intersection_allows_exactly_what_both_allow(first, second, zone):
    both = intersect(first, second)
    allowed = both is not None and allows(both, zone)
    assert allowed == (allows(first, zone) and allows(second, zone))
