"""Law 1 under drafters that lie: every stream is what it is without any.

`python -m tests.laws.simulate --lies --seeds 1000` plays more of them.
"""

import pytest

from tests.laws.liars import lying
from tests.laws.simulation import Schedule, run, violations


@pytest.mark.parametrize("seed", range(9000, 9012))
def test_whatever_a_drafter_says_and_whatever_becomes_of_it_no_token_changes(seed: int) -> None:
    with lying(seed):
        assert violations(run(Schedule.draw(seed, drafters=1))) == []


def test_lies_are_verified_and_some_truth_among_them_is_accepted_or_the_law_about_them_is_empty() -> None:
    accepted = 0
    for seed in range(9100, 9104):
        with lying(seed):
            history = run(Schedule.draw(seed, blows=False, loss=False, drafters=1))
        assert violations(history) == []
        accepted += history.accepted_drafts
    assert accepted > 100
