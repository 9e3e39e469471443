"""The index of subscriptions agrees with the plain meaning of a pattern."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.subject_index import SubjectIndex, check_pattern, matches

tokens = st.sampled_from(["a", "b", "c"])
subjects = st.lists(tokens, min_size=1, max_size=4).map(".".join)
patterns = st.tuples(st.lists(st.one_of(tokens, st.just("*")), min_size=1, max_size=3), st.booleans()).map(
    lambda parts: ".".join(parts[0] + [">"] * parts[1]))


@pytest.mark.parametrize(("pattern", "subject", "expected"), [
    ("a.b", "a.b", True), ("a.b", "a.c", False), ("a.*", "a.b", True), ("a.*", "a", False), ("a.*", "a.b.c", False),
    ("a.>", "a.b.c", True), ("a.>", "a", False), (">", "a", True), ("*.b.>", "a.b.c", True), ("*", "a.b", False),
])
def test_a_pattern_means_what_nats_says(pattern, subject, expected):
    assert matches(pattern, subject) is expected


class Member:
    """Compared by identity, as subscriptions are."""


@given(st.lists(st.tuples(patterns, st.sampled_from([None, None, "g", "h"])), max_size=12),
       st.lists(st.integers(0, 11)), subjects)
def test_the_index_finds_what_a_scan_of_all_patterns_finds(added, removed, subject):
    index: SubjectIndex[Member] = SubjectIndex()
    members = [(pattern, queue, Member()) for pattern, queue in added]
    for pattern, queue, member in members:
        index.add(pattern, member, queue)
        index.route(subject)
    gone = {number for number in removed if number < len(members)}
    for number in gone:
        index.remove(members[number][0], members[number][2])
    expected = [m for n, (p, q, m) in enumerate(members) if n not in gone and matches(p, subject) and q is None]
    groups: dict[str, list[Member]] = {}
    for n, (p, q, m) in enumerate(members):
        if n not in gone and matches(p, subject) and q is not None:
            groups.setdefault(q, []).append(m)
    route = index.route(subject)
    assert list(route.all) == expected
    assert [list(group) for group in route.groups] == list(groups.values())


@given(st.lists(patterns, max_size=8))
def test_an_index_that_lost_all_its_members_is_empty_again(added):
    index: SubjectIndex[Member] = SubjectIndex()
    members = [(pattern, Member()) for pattern in added]
    for pattern, member in members:
        index.add(pattern, member)
    for pattern, member in members:
        index.remove(pattern, member)
    assert not index._root.children and not index._root.rest


@pytest.mark.parametrize("wrong", ["", "a..b", ".a", "a.", "a b", "a.\n", "a.>.b"])
def test_what_is_no_pattern_is_refused(wrong):
    with pytest.raises(ValueError):
        check_pattern(wrong)


@pytest.mark.parametrize("wrong", ["a.*", "a.>", ">", "*", "a..b"])
def test_nothing_can_be_published_to_a_pattern(wrong):
    with pytest.raises(ValueError):
        SubjectIndex().route(wrong)
