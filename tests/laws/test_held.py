"""The laws hold as well while routers hold requests back."""

import pytest

from router import admission, service
from tests.laws.simulation import Schedule, run, violations


def test_whatever_dies_every_stream_is_whole_though_it_waited_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    let_in = 0
    look = service.Router._let_in_some

    def counted(router: service.Router) -> int:
        nonlocal let_in
        left = look(router)
        let_in += left
        return left

    monkeypatch.setattr(admission, "FULL_S", 0.004)
    monkeypatch.setattr(admission, "FULL_ROUNDS", 0.1)
    monkeypatch.setattr(service.Router, "_let_in_some", counted)
    for seed in range(100, 115):
        assert violations(run(Schedule.draw(seed))) == []
    assert let_in > 10
