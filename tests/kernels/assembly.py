"""The few instructions of PTX that the Triton kernels write themselves, carried out with numpy and torch.

Operands are arrays of 32-bit registers. Rounding is that of torch, to the nearest.
"""

import numpy as np
import torch
from numpy.typing import NDArray

Registers = NDArray[np.uint32]

_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def carried_out(assembly: str, outputs: int, *inputs: Registers) -> list[Registers]:
    """What `assembly`, as inline assembler with $0 for its first output, leaves in its outputs.

    The first outputs stand in the inputs' own registers, as a compiler may put them unless told otherwise: what reads
    an input after it has written an output gets that output. Raises KeyError for an operand that nobody wrote and
    ValueError for an unknown instruction.
    """
    slots = [*inputs, *[inputs[0] * 0] * outputs]
    names = {f"${outputs + index}": index for index in range(len(inputs))} | {f"${i}": i for i in range(outputs)}
    temporary: dict[str, Registers] = {}

    def read(operand: str) -> Registers:
        if operand in names:
            return slots[names[operand]]
        if operand[0] in "0123456789":
            constant = operand[2:] if operand.startswith("0f") else operand
            return np.uint32(int(constant, 16 if operand.startswith("0f") else 0)) + inputs[0] * 0
        return temporary[operand]

    for line in assembly.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        instruction, rest = line.strip().split(" ", 1)
        target, *operands = [operand.strip() for operand in rest.split(",")]
        value = _value(instruction, [read(operand) for operand in operands])
        if target in names:
            slots[names[target]] = value
        else:
            temporary[target] = value
    return [slots[index] for index in range(outputs)]


def pairs(registers: Registers, kind: torch.dtype) -> torch.Tensor:
    """Registers as two numbers each, the lower half first: [registers, 2] in float64."""
    return torch.from_numpy(registers.view(np.int16)).view(kind).view(-1, 2).double()


def _value(instruction: str, operands: list[Registers]) -> Registers:
    name, *suffixes = instruction.split(".")
    match name, operands:
        case "mov", [value]:
            return value
        case "and", [a, b]:
            return a & b
        case "or", [a, b]:
            return a | b
        case "xor", [a, b]:
            return a ^ b
        case "shl", [a, b]:
            return a << b
        case "shr", [a, b] if suffixes == ["u32"]:
            return a >> b
        case "lop3", [a, b, c, table]:
            terms = [(a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c) for bit in range(8)]
            return np.bitwise_or.reduce([term for bit, term in enumerate(terms) if int(table[0]) >> bit & 1])
        case "prmt", [a, b, selector]:
            both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
            chosen = [int(selector[0]) >> 4 * byte & 7 for byte in range(4)]
            parts = [(both >> np.uint64(8 * of) & np.uint64(255)) << np.uint64(8 * at) for at, of in enumerate(chosen)]
            return np.bitwise_or.reduce(parts).astype(np.uint32)
        case ("sub" | "mul"), [a, b] if suffixes == ["rn", "f32"]:
            one, other = a.view(np.float32), b.view(np.float32)
            return (one - other if name == "sub" else one * other).view(np.uint32)
        case ("sub" | "mul"), [a, b] if suffixes[0] == "rn" and suffixes[1].removesuffix("x2") in _TYPES:
            kind = _TYPES[suffixes[1].removesuffix("x2")]
            one, other = pairs(a, kind), pairs(b, kind)
            return _registers(one - other if name == "sub" else one * other, kind)
        case "fma", [a, b, c] if suffixes[0] == "rn" and suffixes[1].removesuffix("x2") in _TYPES:
            kind = _TYPES[suffixes[1].removesuffix("x2")]
            # one rounding: a product of two such numbers and its sum with a third are exact in float64 here
            return _registers(pairs(a, kind) * pairs(b, kind) + pairs(c, kind), kind)
        case "cvt", [high, low] if suffixes == ["rn", "bf16x2", "f32"]:
            both = torch.from_numpy(np.stack([low.view(np.float32), high.view(np.float32)], axis=1))
            return _registers(both, torch.bfloat16)
    raise ValueError(f"no such instruction is carried out here: {instruction} with {len(operands)} operands")


def _registers(numbers: torch.Tensor, kind: torch.dtype) -> Registers:
    return numbers.to(kind).contiguous().view(torch.int16).numpy().view(np.uint32)[:, 0]
