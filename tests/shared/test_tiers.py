"""Tiers order work without touching what a client may order itself."""

from gateway.openai.parameters import MAX_PRIORITY
from shared import tiers


def test_no_wish_of_a_client_lifts_it_above_the_next_tier():
    best_of = {tier: tiers.priority(tier, MAX_PRIORITY) for tier in tiers.TIERS}
    worst_of = {tier: tiers.priority(tier, -MAX_PRIORITY) for tier in tiers.TIERS}
    assert best_of["flex"] < worst_of["default"] <= 0 <= best_of["default"] < worst_of["priority"]


def test_a_weight_that_is_none_counts_as_one():
    assert [tiers.tenants_weight(said) for said in (4.0, 0.001, 1000.0)] == [4.0, 0.001, 1000.0]
    assert [tiers.tenants_weight(said) for said in (0.0, -1.0, 1e9, float("nan"), float("inf"))] == [1.0] * 5


def test_a_tier_of_a_later_version_counts_as_the_default_one():
    assert [tiers.known(name) for name in ("flex", "priority", "default", "turbo", "")] == [
        "flex", "priority", "default", "default", "default"]
