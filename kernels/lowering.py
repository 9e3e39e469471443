"""Compiling the Triton kernels for a GPU that is not there: `python -m kernels.lowering [--json FILE]`.

The interpreter accepts much that the compiler refuses, and knows neither registers nor shared memory. Here every launch
that the wrappers make for a Llama-3.1-8B shape is lowered to machine code for Hopper (sm_90) with the assembler inside
the triton package, and the resources it takes are listed. A kernel that compiles has not thereby run.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import INTERPRETED, Recorded, recording

HOPPER = GPUTarget("cuda", 90, 32)

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

_PRODUCT = re.compile(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.(m\d+n\d+k\d+[.\w]*)")


@dataclass(frozen=True, slots=True)
class Lowered:
    """What one compiled kernel takes; `None` where the disassembler is missing."""

    name: str
    kernel: str
    registers: int | None  # per thread
    spilled_bytes: int | None  # stack and local memory per thread
    shared_bytes: int  # per program
    num_warps: int
    cubin_bytes: int
    products: tuple[str, ...]  # the tensor core instructions in it, each once


def lower(name: str, recorded: Recorded) -> Lowered:
    """Compile one recorded launch for Hopper. Raises what the compiler raises."""
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, so kernels cannot be compiled; unset it and start again")
    source = source_of(recorded)
    compiled = triton.compile(source, target=HOPPER, options=dict(recorded.options))
    cubin = compiled.asm["cubin"]
    registers, spilled = _resources(cubin)
    return Lowered(
        name=name,
        kernel=recorded.kernel.__name__,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        num_warps=compiled.metadata.num_warps,
        cubin_bytes=len(cubin),
        products=tuple(sorted(set(_PRODUCT.findall(compiled.asm["ptx"])))),
    )


def source_of(recorded: Recorded) -> ASTSource:
    """The specialisation that a launch with these arguments gets: 1 is a constant, multiples of 16 are known."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    positional = iter(recorded.arguments)
    for index, parameter in enumerate(recorded.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = recorded.constants[parameter.name]
            continue
        value = next(positional)
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            element = _POINTERS[value.base.dtype].removeprefix("*")
            signature[parameter.name] = f"tensordesc<{element}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        elif value == 1:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(recorded.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of stack and local memory per thread, read by the `cuobjdump` inside the triton package."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", listing)
    if found is None:
        return None, None
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.lowering", description="Compile every kernel for Hopper.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    options = parser.parse_args(arguments)
    lowered = lower_all()
    print(f"triton {triton.__version__}, sm_90; compiled, not run")
    for one in lowered:
        resources = f"{_or_dash(one.registers):>4} registers {_or_dash(one.spilled_bytes):>3} B spilled"
        print(
            f"{one.kernel:<20}{one.name:<92}{resources} {one.shared_bytes:>7} B shared {one.num_warps:>3} warps "
            + " ".join(one.products)
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in lowered], indent=1) + "\n")
    return 0


def lower_all() -> list[Lowered]:
    """Every distinct kernel that the serving cases launch, compiled once."""
    from kernels.cases import serving_cases

    lowered: dict[str, Lowered] = {}
    for case in serving_cases("meta"):
        if not case.timed or not case.lowered:
            continue
        for recorded in recording(case.run):
            source = source_of(recorded)
            if source.hash() not in lowered:
                lowered[source.hash()] = lower(f"{case.name}: {case.shape}", recorded)
    return list(lowered.values())


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
