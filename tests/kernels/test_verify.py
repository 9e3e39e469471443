"""`python -m kernels.verify`: what it writes, and that a wrong kernel does not pass."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import cases, ops, verify
from kernels.case import Case


def case(got: float, tolerance: float = 1e-3) -> Case:
    return Case(
        "sum",
        "rows 2",
        run=lambda: (torch.full((2,), got),),
        expect=lambda: (torch.full((2,), 2.0),),
        tolerance=tolerance,
        bytes=8,
        flops=2,
    )


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *only: Case) -> tuple[int, dict]:
    monkeypatch.setattr(cases, "small_cases", lambda device: iter(only))
    monkeypatch.setattr(cases, "serving_cases", lambda device: iter(only))
    status = verify.main(["--json", str(folder / "report.json")])
    return status, json.loads((folder / "report.json").read_text())


def test_a_report_has_exactly_the_documented_fields(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, report = run(monkeypatch, tmp_path, case(2.0))
    assert status == 0
    assert set(report) == {"device", "copy_bytes_per_s", "matmul_flops_per_s", "versions", "kernels"}
    assert {"python", "torch", "triton", "commit", "date"} <= set(report["versions"])
    [row] = report["kernels"]
    assert set(row) == {"name", "shape", "ok", "error", "time_us", "bytes", "flops", "share", "library_us"}
    assert (row["name"], row["shape"], row["ok"], row["error"]) == ("sum", "rows 2", True, 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's times are reported")
def test_the_interpreter_reports_no_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, report = run(monkeypatch, tmp_path, case(2.0))
    assert report["device"].startswith("Triton interpreter")
    assert report["copy_bytes_per_s"] is report["matmul_flops_per_s"] is None
    assert [report["kernels"][0][name] for name in ("time_us", "share", "library_us")] == [None] * 3


def test_a_time_is_set_beside_what_the_machine_does_and_the_fastest_way_of_the_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> float:
        raise RuntimeError("no such product here")

    def taking(time_us: float) -> Callable[[], float]:
        return lambda: time_us

    monkeypatch.setattr(verify, "chain_time_us", lambda calls: calls[0]())
    moved = replace(
        case(2.0),
        copies=lambda: [taking(10.0)],
        library=lambda: [[taking(8.0)], [refuse], [taking(5.0)]],
    )
    machine = verify.Machine(copy_bytes_per_s=4e6, matmul_flops_per_s=4e6)
    # Eight bytes take 2 us and two operations half of one.
    result = verify.verify(moved, machine)
    assert (result.ok, result.time_us, result.share, result.library_us) == (True, 10.0, pytest.approx(0.2), 5.0)
    assert "the library refuses: no such product here" in capsys.readouterr().err
    assert verify.verify(replace(moved, library=lambda: [[refuse]]), machine).library_us is None
    assert verify.verify(replace(moved, library=None), machine).library_us is None
    assert verify.verify(replace(moved, timed=False), machine).time_us is None


@pytest.mark.parametrize("wrong", [2.1, float("nan"), float("inf")])
def test_a_wrong_result_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: float) -> None:
    status, report = run(monkeypatch, tmp_path, case(2.0), case(wrong))
    assert status == 1
    assert [row["ok"] for row in report["kernels"]] == [True, False]


def test_a_result_within_the_tolerance_passes_with_its_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status, report = run(monkeypatch, tmp_path, case(2.001))
    assert status == 0
    assert report["kernels"][0]["error"] == pytest.approx(5e-4, rel=1e-2)


def test_a_kernel_that_raises_is_wrong_and_the_others_are_still_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("out of shared memory")

    failing = Case("broken", "rows 1", run=broken, expect=broken, tolerance=0.0, bytes=0, flops=0)
    status, report = run(monkeypatch, tmp_path, failing, case(2.0))
    assert status == 1
    assert [(row["ok"], row["error"]) for row in report["kernels"]] == [(False, None), (True, 0.0)]
    assert "out of shared memory" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="small cases are the interpreter's")
def test_every_kernel_of_the_table_passes_on_small_shapes() -> None:
    torch.manual_seed(0)
    results = [verify.verify(one, machine=None) for one in cases.small_cases("cpu")]
    assert [result for result in results if not result.ok] == []
    ours = [name for name in ops.Ops._fields if getattr(ops.triton(), name) != getattr(ops.REFERENCE, name)]
    assert set(ours) - {"name"} <= {result.name for result in results}
