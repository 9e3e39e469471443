"""The phases of a start."""

from shared.timeline import Timeline, process_age_s


def test_phases_come_in_order_and_make_up_the_whole() -> None:
    timeline = Timeline(age_s=1.5)
    for phase in ("imports", "bus", "imports"):
        timeline.mark(phase)
    found = timeline.milliseconds()
    assert list(found) == ["imports_ms", "bus_ms", "total_ms"]
    assert found["imports_ms"] >= 1500
    assert abs(found["total_ms"] - found["imports_ms"] - found["bus_ms"]) <= 1


def test_a_process_is_older_than_what_it_has_computed_since() -> None:
    before = process_age_s()
    assert 0.0 < before <= process_age_s()
