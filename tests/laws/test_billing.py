"""Law 8: every delivered token is metered once. `python -m tests.laws.billing` plays more of these histories."""

from collections.abc import Iterator

import pytest

from tests.laws.billing import outcomes, play
from tests.postgres_server import new_database, postgres_server


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_server() as server:
        yield server


@pytest.mark.parametrize("first", [0, 200, 400])
def test_the_ledger_is_what_was_delivered_is_what_clients_counted(first: int) -> None:
    world = play(first, 200)
    assert world.found == []
    fared = outcomes(world)
    assert fared["200"] > 100 and fared["429"] > 20 and fared["409"] > 5  # it was a history of many kinds


def test_the_same_holds_in_postgresql_also_for_gateways_one_after_the_other(postgres: str) -> None:
    url = new_database(postgres, "histories")
    for first in (600, 650, 700):
        assert play(first, 50, url).found == []
