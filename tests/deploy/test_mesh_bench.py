"""The mesh benchmark's arguments and figures, without a mesh."""

import argparse

import pytest

from deploy.bench.mesh import Side, median_row, peer


def test_a_peer_is_a_url_and_the_processes_that_serve_it() -> None:
    assert peer("other=http://127.0.0.1:18080@12,34") == Side("other", "http://127.0.0.1:18080", {"12": 12, "34": 34})


@pytest.mark.parametrize("text", ["other", "other=http://h:1", "=http://h:1@1", "other=h:1@1", "other=http://h:1@x"])
def test_a_peer_that_cannot_be_read_says_how_to_write_one(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="NAME=http://HOST:PORT@PID,PID"):
        peer(text)


def test_a_row_has_the_medians_of_its_rounds_and_all_their_failures() -> None:
    rounds = [{"failures": f, "ttft_p50_ms": t, "cpu_s_of": {"gateway-1": c}}
              for f, t, c in ((0, 5.0, 1.0), (1, 9.0, 3.0), (0, None, 2.0))]
    row = median_row("tokenmill", 32, rounds)
    assert (row["side"], row["streams"], row["failures"], row["ttft_p50_ms"]) == ("tokenmill", 32, 1, 7.0)
    assert row["cpu_s_of"] == {"gateway-1": 2.0}
    assert row["rounds"] == rounds
