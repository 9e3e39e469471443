"""Every Triton kernel compiles to machine code for a Hopper GPU, with the assembler inside the triton package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

ROOT = Path(__file__).parents[2]
ASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
# What one program may use on compute capability 9.0.
HOPPER_SHARED_BYTES = 227 * 1024


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    if not ASSEMBLER.exists():
        pytest.skip("this triton carries no ptxas, so nothing can be assembled")
    file = tmp_path_factory.mktemp("lowering") / "kernels.json"
    # A process of its own: this one may interpret kernels, and then cannot compile them.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.lowering", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(file.read_text())


def test_every_kernel_compiles_for_hopper(lowered: list[dict]) -> None:
    assert {one["kernel"] for one in lowered} == {
        "_rms_norm",
        "_rotate",
        "_swiglu",
        "_write_kv",
        "_attend_split",
        "_combine_splits",
        "_best_of_tile",
        "_best_of_row",
        "_count_accepted",
    }
    assert all(one["cubin_bytes"] > 0 for one in lowered)


def test_no_kernel_spills_registers_or_asks_for_too_much_shared_memory(lowered: list[dict]) -> None:
    assert [one for one in lowered if one["spilled_bytes"]] == []
    assert [one for one in lowered if one["shared_bytes"] > HOPPER_SHARED_BYTES] == []


def test_one_compiled_attention_serves_every_batch_and_context(lowered: list[dict]) -> None:
    bf16 = [one["name"] for one in lowered if one["kernel"] == "_attend_split" and one["name"].endswith("bf16")]
    assert len(bf16) == 1
