"""Every Triton kernel compiles to machine code for a Hopper GPU, with the assembler inside the triton package."""

import json
import os
import re
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
        "_write_kv_codes",
        "_attend_split",
        "_combine_splits",
        "_best_of_tile",
        "_best_of_row",
        "_count_accepted",
        "_multiply_few",
        "_multiply",
        "_add_splits",
        "_dequantise",
        "_multiply8",
        "_quantise",
        "_embed",
        "_project_heads",
        "_project_gated",
        "_project_added",
        "_choose",
        "_route",
        "_group",
        "_multiply_experts",
        "_merge",
    }
    assert all(one["cubin_bytes"] > 0 for one in lowered)


def test_no_kernel_spills_registers_or_asks_for_too_much_shared_memory(lowered: list[dict]) -> None:
    assert [one for one in lowered if one["spilled_bytes"]] == []
    assert [one for one in lowered if one["shared_bytes"] > HOPPER_SHARED_BYTES] == []


def test_a_product_takes_the_same_instructions_for_every_number_of_rows(lowered: list[dict]) -> None:
    # Only the columns of the instruction, which are rows of activations, differ; never how many inputs it adds at once.
    for kernel, operands in (
        ("_multiply", {"k16.f32.bf16.bf16"}),
        ("_multiply8", {"k32.f32.e4m3.e4m3", "k32.s32.s8.s8"}),
        ("_project_gated", {"k16.f32.bf16.bf16"}),
    ):
        found = {product for one in lowered if one["kernel"] == kernel for product in one["products"]}
        assert {re.sub(r"^m64n\d+", "", product) for product in found} == operands, found


def test_one_compiled_attention_serves_every_batch_and_context(lowered: list[dict]) -> None:
    attention = [one["name"] for one in lowered if one["kernel"] == "_attend_split"]
    bf16 = [name for name in attention if name.startswith("paged_attention: ") and name.endswith("bf16")]
    assert len(bf16) == 1
