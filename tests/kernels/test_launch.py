"""Launches: when a kernel may begin before the one before it has ended, and compiling them ahead of time."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from kernels import launch
from kernels.launch import recording
from kernels.product_cases import random_weight4
from kernels.triton_linear4 import dequantise, linear4

ROOT = Path(__file__).parents[2]
ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


@pytest.fixture(autouse=True)
def _nothing_is_remembered_of_a_device() -> Iterator[None]:
    launch.overlaps.cache_clear()
    yield
    launch.overlaps.cache_clear()


def product() -> None:
    weight = random_weight4(64, 512, 128, "symmetric", torch.float16, "meta")
    linear4(torch.empty(1, 512, dtype=torch.float16, device="meta"), weight)


@pytest.mark.parametrize(
    ("interpreted", "capability", "expected"),
    [(True, None, False), (True, (9, 0), False), (False, None, True), (False, (8, 9), False), (False, (9, 0), True)],
)
def test_kernels_overlap_on_paper_and_on_hopper_but_never_in_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, interpreted: bool, capability: tuple[int, int] | None, expected: bool
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    for recorded in recording(product):
        assert recorded.constants["OVERLAP"] == recorded.options["launch_pdl"] == expected


def test_a_kernel_that_never_waits_is_launched_behind_the_others() -> None:
    weight = random_weight4(64, 512, 128, "symmetric", torch.float16, "meta")
    [recorded] = recording(lambda: dequantise(weight, torch.float16))
    assert "OVERLAP" not in recorded.constants
    assert "launch_pdl" not in recorded.options


@pytest.mark.skipif(not ASSEMBLER.exists(), reason="this triton carries no ptxas, so nothing can be assembled")
def test_each_process_compiles_its_share_ahead_and_together_they_compile_all(tmp_path: Path) -> None:
    kernels = []
    for share in ("0", "1"):
        cache = tmp_path / share
        environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "kernels.compile_ahead", "tests.kernels.test_launch:products", share, "2"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        kernels.append(sorted(file.stem for file in cache.rglob("*.cubin")))
    assert sorted(kernels[0] + kernels[1]) == ["_add_splits", "_multiply"]
    assert len(kernels[0]) == len(kernels[1]) == 1


def products() -> Iterator[object]:
    """The same twice: two launches."""
    return iter((product, product))
