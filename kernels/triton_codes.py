"""Codes of four and eight bits as numbers, and what groups of four-bit codes add to them.

Rule: unpacking is exact, in either of two ways. `numbers_of` and conversions run anywhere. `operand_of` and `widened`
give the type of a tensor core's operands, all codes of a register at a time, without the conversion instructions, which
have a quarter of the others' rate; compiled code only. How codes lie: `kernels.weight4`.
"""

import triton
import triton.language as tl


@triton.jit
def numbers_of(words, zero, QUARTER: tl.constexpr, KIND: tl.constexpr):
    """(code - zero) in float32 of one quarter of words [N, 32] int16, or MXFP4's values; `zero` [N] float32."""
    code = (words >> (4 * QUARTER)).to(tl.int32) & 15
    if KIND == 3:
        # The sign where float32 has it, two bits of exponent and one of mantissa at the lower end of its own: a number
        # 2^126 too small, a subnormal one for the code of 0.5.
        return (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    return code.to(tl.float32) - zero[:, None]


@triton.jit
def operand_of(words, zero, like, QUARTER: tl.constexpr, KIND: tl.constexpr):
    """As `numbers_of`, in the type of `like`, float16 or bfloat16."""
    if KIND == 1:
        counted = (zero + (1024.0 if like.dtype == tl.float16 else 128.0)).to(like.dtype)
        return tl.inline_asm_elementwise(
            _unpacking(QUARTER, KIND, like.dtype),
            "=r,r,r",
            [words, tl.broadcast_to(counted[:, None], words.shape)],
            dtype=like.dtype,
            is_pure=True,
            pack=2,
        )
    return tl.inline_asm_elementwise(
        _unpacking(QUARTER, KIND, like.dtype), "=r,r", [words], dtype=like.dtype, is_pure=True, pack=2
    )


@triton.jit
def widened(codes, like):
    """Codes of FP8 (e4m3) or int8 in the type of `like`, float16 or bfloat16; not NaN, which no code here is."""
    return tl.inline_asm_elementwise(
        _widening(codes.dtype, like.dtype), "=r,=r,r", [codes], dtype=like.dtype, is_pure=True, pack=4
    )


@triton.constexpr_function
def _unpacking(quarter, kind, type_):
    """A quarter's codes of the two words in $1 as two numbers in $0.

    A whole number's code is put into the mantissa of 1024 (float16) or 128 (bfloat16), and that number is taken away.
    MXFP4's bits are put where the type has them, which makes the number a power of two too small. Of bfloat16, GPUs
    before Hopper have no sum and no product, but both at once: times one, or plus the zero that changes no sign.
    """
    half = type_ == tl.float16
    lines = [".reg .b32 both, sign, constant, more;", f"shr.u32 both, $1, {4 * quarter};"]
    if kind == 3:
        lines += [
            "shl.b32 sign, both, 12;",
            "and.b32 sign, sign, 0x80008000;",
            "and.b32 both, both, 0x00070007;",
            f"shl.b32 both, both, {9 if half else 6};",
            "or.b32 both, both, sign;",
            f"mov.b32 constant, {'0x74007400' if half else '0x7e807e80'}; mov.b32 more, 0x80008000;",
            "mul.rn.f16x2 $0, both, constant;" if half else "fma.rn.bf16x2 $0, both, constant, more;",
        ]
    else:
        lines.append(f"lop3.b32 both, both, 0x000f000f, {'0x64006400' if half else '0x43004300'}, 0xea;")
        number = (0x6400 if half else 0x4300) + (8 if kind == 0 else 0)
        lines.append(f"mov.b32 constant, {'$2' if kind == 1 else hex(number << 16 | number)};")
        if half:
            lines.append("sub.rn.f16x2 $0, both, constant;")
        else:
            lines.append("xor.b32 constant, constant, 0x80008000; mov.b32 more, 0x3f803f80;")
            lines.append("fma.rn.bf16x2 $0, both, more, constant;")
    return "{ " + " ".join(lines) + " }"


@triton.constexpr_function
def _widening(codes, type_):
    """The four codes in $2 as numbers in $0 and $1, two in each.

    FP8's exponent and mantissa are put where the type has them, which makes a number a power of two too small. Whole
    numbers, 128 larger, go into the mantissa of 1024 (float16), or of 2^23 and from there to bfloat16.
    """
    half = type_ == tl.float16
    lines = [".reg .b32 both, one, other, more;"]
    if codes == tl.int8:
        lines.append("xor.b32 both, $2, 0x80808080;")
        for output in (0, 1):
            if half:
                lines.append(f"prmt.b32 ${output}, both, 0x64646464, {hex(0x4140 + 0x202 * output)};")
                lines.append(f"mov.b32 one, 0x64806480; sub.rn.f16x2 ${output}, ${output}, one;")
                continue
            for name, byte in (("one", 2 * output), ("other", 2 * output + 1)):
                lines.append(f"prmt.b32 {name}, both, 0x4b000000, {hex(0x7540 + byte)};")
                lines.append(f"sub.rn.f32 {name}, {name}, 0f4B000080;")
            lines.append(f"cvt.rn.bf16x2.f32 ${output}, other, one;")
        return "{ " + " ".join(lines) + " }"
    shift = 1 if half else 4
    mask, power = ("0x3f803f80", "0x5c005c00") if half else ("0x07f007f0", "0x7b807b80")
    # $2 is read before $0 is written: the compiler may give both one register.
    lines.append("prmt.b32 both, $2, 0, 0x1404; prmt.b32 other, $2, 0, 0x3424;")
    lines.append(f"mov.b32 one, {power}; mov.b32 more, 0x80008000;")
    for output, two in ((0, "both"), (1, "other")):
        lines += [
            f"shr.u32 ${output}, {two}, {shift};",
            f"and.b32 ${output}, ${output}, {mask};",
            f"lop3.b32 ${output}, {two}, 0x80008000, ${output}, 0xea;",
            f"mul.rn.f16x2 ${output}, ${output}, one;" if half else f"fma.rn.bf16x2 ${output}, ${output}, one, more;",
        ]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def group_scale(pointers, KIND: tl.constexpr):
    """The scale of groups in float32."""
    if KIND == 3:
        exponent = tl.load(pointers).to(tl.int32)
        return tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
    return tl.load(pointers).to(tl.float32)


@triton.jit
def group_offset(pointers, KIND: tl.constexpr):
    """The minimum of groups, or nothing; and the code that stands for zero. Both shaped like `pointers`."""
    nothing = tl.zeros(pointers.shape, tl.float32)
    if KIND == 0:
        return nothing, nothing + 8.0
    if KIND == 3:
        return nothing, nothing
    if KIND == 1:
        return nothing, tl.load(pointers).to(tl.float32)
    return tl.load(pointers).to(tl.float32), nothing
