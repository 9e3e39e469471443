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


WAIT = re.compile(r"griddepcontrol\.wait\s*;")
OVERLAPPING = {
    "_attend_split",
    "_combine_splits",
    "_multiply",
    "_add_splits",
    "_multiply8",
    "_embed",
    "_project_heads",
    "_project_gated",
    "_project_added",
    "_choose",
}


def made_by(module: str, file: Path, *options: str) -> list[dict]:
    """What a module writes into a file, in a process of its own: this one may interpret kernels, not compile them."""
    if not ASSEMBLER.exists():
        pytest.skip("this triton carries no ptxas, so nothing can be assembled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *options, str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return made_by("kernels.lowering", tmp_path_factory.mktemp("lowering") / "kernels.json", "--json")


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The PTX of the same launches, and of some more."""
    return made_by("tests.kernels.ptx", tmp_path_factory.mktemp("ptx") / "ptx.json")


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
        "_multiply",
        "_dequantise",
        "_multiply8",
        "_multiply8_many",
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


def test_splits_that_another_launch_adds_compile_too(assembly: list[dict]) -> None:
    kernels = {one["kernel"] for one in assembly if one["name"].startswith("linear4 without a workspace")}
    assert kernels == {"_multiply", "_add_splits"}


def test_no_kernel_spills_registers_or_asks_for_too_much_shared_memory(lowered: list[dict]) -> None:
    assert [one for one in lowered if one["spilled_bytes"]] == []
    assert [one for one in lowered if one["shared_bytes"] > HOPPER_SHARED_BYTES] == []


def test_a_product_takes_the_same_instructions_for_every_number_of_rows(lowered: list[dict]) -> None:
    # Only the columns of the instruction, which are rows of activations, differ; never how many inputs it adds at once.
    for kernel, operands in (
        ("_multiply", {"k16.f32.bf16.bf16"}),
        ("_multiply8", {"k32.f32.e4m3.e4m3", "k32.s32.s8.s8"}),
        ("_multiply8_many", {"k32.f32.e4m3.e4m3"}),
        ("_project_heads", {"k16.f32.bf16.bf16"}),
        ("_project_gated", {"k16.f32.bf16.bf16"}),
        ("_project_added", {"k16.f32.bf16.bf16"}),
        ("_choose", {"k16.f32.bf16.bf16"}),
    ):
        found = {product for one in lowered if one["kernel"] == kernel for product in one["products"]}
        assert {re.sub(r"^m64n\d+", "", product) for product in found} == operands, found


def test_one_compiled_attention_serves_every_batch_and_context(lowered: list[dict]) -> None:
    attention = [one["name"] for one in lowered if one["kernel"] == "_attend_split"]
    bf16 = [name for name in attention if name.startswith("paged_attention: ") and name.endswith("bf16")]
    assert len(bf16) == 1


def conversions(ptx: str) -> list[str]:
    """Its instructions that turn whole numbers or FP8 into floating-point numbers."""
    return re.findall(r"\bcvt\.[\w.]*(?:f16|f32|f16x2|bf16x2)\.(?:[su](?:8|16|32)|e4m3x2)\b", ptx)


def test_unpacking_takes_no_conversion_instruction(assembly: list[dict]) -> None:
    # They have a quarter of the others' rate. Elsewhere they may stand, and are found.
    found = {(one["kernel"], one["name"]): conversions(one["ptx"]) for one in assembly}
    assert any(found[key] for key in found if key[0] == "_dequantise")
    for kernel, styles in (
        ("_multiply", ("symmetric", "minima", "mxfp4")),
        ("_multiply_experts", ("mxfp4",)),
        ("_attend_split", ("fp8, bf16", "int8, bf16")),
    ):
        for style in styles:
            unpacking = [found[key] for key in found if key[0] == kernel and style in key[1]]
            assert unpacking, (kernel, style)
            assert not any(unpacking), (kernel, style, unpacking)


def test_nothing_is_read_or_written_before_the_previous_kernel_has_ended(assembly: list[dict]) -> None:
    assert {one["kernel"] for one in assembly if "griddepcontrol" in one["ptx"]} == OVERLAPPING
    for one in assembly:
        if one["kernel"] not in OVERLAPPING:
            continue
        [before, after] = WAIT.split(one["ptx"])
        # On no way into the kernel: nothing jumps before, and memory is only told what will be wanted.
        touched = re.findall(r"\b(?:ld|st|atom|red|multimem)\.(?!param)\S+|\bcp\.\S+|\bbra\b.*|\bmbarrier\S+", before)
        assert touched == [], (one["kernel"], one["name"])
        assert re.search(r"\bld\.global|\bcp\.async", after), one["kernel"]
        assert "griddepcontrol.launch_dependents" in after, one["kernel"]
        assert "griddepcontrol" not in before, one["kernel"]


def test_products_ask_for_their_first_weights_before_they_wait(assembly: list[dict]) -> None:
    for one in assembly:
        if one["kernel"] in ("_multiply", "_project_heads", "_project_gated", "_project_added", "_choose"):
            before, after = WAIT.split(one["ptx"])
            assert "prefetch.global.L2" in before, one["name"]
            assert "prefetch.global.L2" not in after, one["name"]


def test_products_of_four_bits_compile_for_gpus_before_hopper(tmp_path: Path) -> None:
    if not ASSEMBLER.exists():
        pytest.skip("this triton carries no ptxas, so nothing can be assembled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.older_gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {"symmetric": "sm_80", "zeros": "sm_80", "mxfp4": "sm_80"}
