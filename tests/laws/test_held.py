"""The laws hold as well while routers hold requests back."""

import pytest

from router import admission
from router.desk import Desk
from tests.laws.simulation import Schedule, run, violations


def test_whatever_dies_every_stream_is_whole_though_it_waited_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    let_in = 0
    look = Desk._let_in_some

    def counted(desk: Desk) -> int:
        nonlocal let_in
        left = look(desk)
        let_in += left
        return left

    monkeypatch.setattr(admission, "FULL_S", 0.004)
    monkeypatch.setattr(admission, "FULL_ROUNDS", 0.1)
    monkeypatch.setattr(Desk, "_let_in_some", counted)
    for seed in range(100, 125):
        assert violations(run(Schedule.draw(seed))) == []
    assert let_in > 10
