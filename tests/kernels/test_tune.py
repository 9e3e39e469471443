"""The table of measured launch choices: what enters it, what is read from it, and that it changes no bit."""

from pathlib import Path

import pytest
import torch

from kernels import tune, tuned
from kernels.launch import Launch, recording
from kernels.product_cases import random_rows8, random_weight4, random_weight8
from kernels.triton_linear4 import linear4
from kernels.triton_linear8 import linear8

FALLBACK, WIDE, DEEP = Launch(64, 4, 4), Launch(128, 8, 4), Launch(64, 4, 6)


def best(times_us: dict[Launch, float], rounds_differently: tuple[Launch, ...] = ()) -> dict | None:
    """What is found among launches that take so long; a launch without a time cannot be launched."""

    def run(choice: Launch) -> torch.Tensor:
        if choice not in times_us:
            raise RuntimeError("out of resource: shared memory")
        return torch.tensor([1.0 + (choice in rounds_differently)])

    return tune.best("linear4 64 x 64, 16 rows", run, FALLBACK, [WIDE, DEEP], times_us.__getitem__)


def test_the_fastest_enters_with_its_measurement() -> None:
    found = best({FALLBACK: 10.0, WIDE: 9.0, DEEP: 8.0})
    assert found == {"block": 64, "num_warps": 4, "num_stages": 6, "time_us": 8.0, "fallback_us": 10.0}


def test_a_gain_within_the_noise_a_failure_and_another_rounding_do_not_enter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert best({FALLBACK: 10.0, WIDE: 9.8, DEEP: 9.9}) is None
    assert best({FALLBACK: 10.0}) is None
    assert best({FALLBACK: 10.0, WIDE: 5.0, DEEP: 12.0}, (WIDE,)) is None
    said = capsys.readouterr().out
    assert "cannot be launched: RuntimeError" in said and "rounds differently and is left out" in said


def test_a_table_serves_its_own_device_and_others_fall_back() -> None:
    entry = {"block": 128, "num_warps": 8, "num_stages": 4, "time_us": 1.0, "fallback_us": 2.0}
    table = {"NVIDIA H200": {"choices": {"linear4 4096 x 4096, 16 rows": entry}}}
    name = tuned.key("linear4", 4096, 4096, 12)
    assert tuned.chosen(table, "NVIDIA H200", name, FALLBACK) == WIDE
    assert tuned.chosen(table, "NVIDIA L4", name, FALLBACK) == FALLBACK
    assert tuned.chosen(table, "NVIDIA H200", tuned.key("linear4", 4096, 4096, 17), FALLBACK) == FALLBACK
    assert tuned.key("linear8", 8, 9, 5000) == "linear8 8 x 9, 64 rows"
    assert tuned.key("linear8 many", 8, 9, 65) == "linear8 many 8 x 9, 512 rows"


def test_every_candidate_of_every_workload_reaches_its_launch() -> None:
    kernels = {"linear4": "_multiply", "linear8": "_multiply8", "linear8 many": "_multiply8_many"}
    for operator, shape, rows in tune.workloads():
        runs, fallback = tune.workload(operator, *shape, rows, "meta")
        others = tune.candidates(fallback)
        assert fallback not in others and len(set(others)) == len(others) > 4
        for choice in (fallback, *others):
            [recorded] = recording(lambda: runs[0](choice))  # noqa: B023
            assert recorded.kernel.__name__ == kernels[operator]
            block = recorded.constants["BLOCK" if operator == "linear4" else "BLOCK_OUTPUTS"]
            options = recorded.options["num_warps"], recorded.options["num_stages"]
            assert (block, *options) == choice


def test_the_table_in_the_tree_holds_what_tuning_can_have_found() -> None:
    names = {tuned.key(operator, *shape, rows): operator for operator, shape, rows in tune.workloads()}
    for device in tuned.table().values():
        assert {"torch", "triton", "commit", "date"} <= set(device["versions"])
        for name, entry in device["choices"].items():
            assert name in names
            choice = Launch(entry["block"], entry["num_warps"], entry["num_stages"])
            assert choice in tune.candidates(FALLBACK._replace(num_stages=9))
            assert entry["time_us"] <= entry["fallback_us"] * tune.GAIN + 0.01


@pytest.mark.parametrize("rows", [3, 65])
def test_every_candidate_gives_the_same_bits(rows: int) -> None:
    kind, code = torch.float16, torch.float8_e4m3fn
    x, four = torch.randn(rows, 304).to(kind), random_weight4(70, 304, 128, "symmetric", kind, "cpu")
    rows8, eight = random_rows8(rows, 304, code, False, "cpu"), random_weight8(70, 304, code, False, "cpu")
    expected = linear4(x, four), linear8(rows8, eight, kind)
    for choice in (WIDE, DEEP):
        assert torch.equal(linear4(x, four, choice=choice), expected[0])
        assert torch.equal(linear8(rows8, eight, kind, choice), expected[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured")
def test_without_a_gpu_nothing_is_measured_and_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--json", str(tmp_path / "tuned.json")]) == 2
    assert "no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "tuned.json").exists()
