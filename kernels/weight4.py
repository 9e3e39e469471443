"""Weights of four bits, laid out in tiles as the Triton products read them, and taken out again.

Rule: packing rounds nothing; codes, scales and offsets come back as they went in.

    weight[n, c] = scale[n, g] * (code[n, c] - 8)               symmetric
                 = scale[n, g] * (code[n, c] - zero[n, g])      zero point, a whole number 0..15
                 = scale[n, g] * code[n, c] + minimum[n, g]     scale and minimum

for output n, input c and its group g = c // group of 32, 64 or 128 inputs.

A tile is 64 outputs of 128 inputs: 4 KiB in one piece, so that a program reads its share of the matrix from one end to
the other. Each output has 32 words of 16 bits; word j holds the inputs j, 32 + j, 64 + j and 96 + j of the tile:

    word            0    1   ..  31
    bits 0..3       0    1   ..  31     quarter 0
    bits 4..7      32   33   ..  63     quarter 1
    bits 8..11     64   65   ..  95     quarter 2
    bits 12..15    96   97   .. 127     quarter 3

A word is as wide as an operand of the tensor cores, so words reach the threads that multiply them by the same
instructions, and one mask on two neighbouring words is two neighbouring operands. A quarter is two steps of a tensor
core, and a group is one, two or four quarters. Nothing is shuffled between threads.

Outputs are filled up to whole tiles with weights of zero, and inputs too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_OUTPUTS = 64
TILE_INPUTS = 128
TILE_WORDS = 32  # of an output
QUARTERS = 4
GROUPS = (32, 64, 128)
MIDDLE = 8  # the code of zero in symmetric weights
MXFP4_GROUP = 32
MXFP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True, slots=True)
class Weight4:
    """A matrix [outputs, inputs]. U tiles of outputs, I tiles of inputs, P groups of a tile."""

    words: Tensor  # [U, I, 64, 32] int16, four codes each
    scales: Tensor  # [U, I, P, 64] of a floating type, or the exponents of MXFP4 in uint8
    offsets: Tensor | None  # as scales: zero points in uint8, or minima in the type of scales; None: symmetric
    outputs: int
    inputs: int
    group: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory, filling included."""
        return sum(part.nbytes for part in (self.words, self.scales, self.offsets) if part is not None)

    @property
    def kind(self) -> int:
        """0 symmetric, 1 zero points, 2 minima, 3 MXFP4."""
        if self.scales.dtype == torch.uint8:
            return 3
        return 0 if self.offsets is None else 1 if self.offsets.dtype == torch.uint8 else 2

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a kernel gets. Where there are no offsets it does not touch the third."""
        return self.words, self.scales, self.scales if self.offsets is None else self.offsets


def packed(
    codes: Tensor, scales: Tensor, group: int, *, zeros: Tensor | None = None, minima: Tensor | None = None
) -> Weight4:
    """Codes 0..15 [N, C], scales [N, ceil(C / group)] and at most one kind of offsets, shaped like the scales.

    Scales in uint8 are exponents, and the codes MXFP4's.
    Raises ValueError for anything that the layout cannot hold.
    """
    outputs, inputs = codes.shape
    offsets = zeros if zeros is not None else minima
    if group not in GROUPS:
        raise ValueError(f"groups of {group} inputs cannot be packed; {', '.join(map(str, GROUPS))} can")
    if zeros is not None and minima is not None:
        raise ValueError("weights have zero points or minima, not both")
    if scales.dtype == torch.uint8 and (offsets is not None or group != MXFP4_GROUP):
        raise ValueError(f"MXFP4 has groups of {MXFP4_GROUP} and no offsets")
    for name, values in (("scales", scales), ("offsets", offsets)):
        if values is not None and values.shape != (outputs, -(-inputs // group)):
            raise ValueError(f"{name} {tuple(values.shape)} do not fit codes {tuple(codes.shape)} in groups of {group}")
    for name, values in (("codes", codes), ("zero points", zeros)):
        if values is not None and values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 16:
            raise ValueError(f"{name} lie in 0..15, these in {int(values.min())}..{int(values.max())}")

    tiles = -(-outputs // TILE_OUTPUTS), -(-inputs // TILE_INPUTS)
    grid = _filled(codes, tiles, TILE_INPUTS, 0 if scales.dtype == torch.uint8 else MIDDLE).to(torch.int16)
    quarters = grid.view(tiles[0], TILE_OUTPUTS, tiles[1], QUARTERS, TILE_WORDS)
    words = torch.zeros_like(quarters[:, :, :, 0])
    for quarter in range(QUARTERS):
        words |= quarters[:, :, :, quarter] << (4 * quarter)
    # The filling is a weight of zero in each of the kinds: its scale and its minimum are, or MXFP4's code is.
    filling = MIDDLE if zeros is not None else 0
    kind = scales.dtype if zeros is None else torch.uint8
    return Weight4(
        words=words.permute(0, 2, 1, 3).contiguous(),
        scales=_by_tile(scales, tiles, group, 0),
        offsets=None if offsets is None else _by_tile(offsets.to(kind), tiles, group, filling),
        outputs=outputs,
        inputs=inputs,
        group=group,
    )


def unpacked(weight: Weight4) -> tuple[Tensor, Tensor, Tensor | None]:
    """What was packed: codes [N, C] uint8, scales and offsets [N, ceil(C / group)]."""
    quarters = torch.stack([(weight.words >> (4 * quarter)) & 15 for quarter in range(QUARTERS)], dim=3)
    codes = quarters.permute(0, 2, 1, 3, 4).reshape(-1, weight.words.shape[1] * TILE_INPUTS)  # of [U, I, 64, 4, 32]
    offsets = None if weight.offsets is None else _from_tiles(weight.offsets, weight)
    codes = codes[: weight.outputs, : weight.inputs].to(torch.uint8)
    return codes.contiguous(), _from_tiles(weight.scales, weight), offsets


def dequantised(weight: Weight4) -> Tensor:
    """The matrix [N, C] in float64, where nothing of it is rounded."""
    codes, scales, offsets = unpacked(weight)
    if weight.kind == 3:
        values = torch.tensor(MXFP4, dtype=torch.float64, device=codes.device)[codes.long()]
        return values * torch.exp2(_of_inputs(scales, weight) - 127)
    wide, steps = codes.double(), _of_inputs(scales, weight)
    if offsets is None:
        return steps * (wide - MIDDLE)
    if weight.kind == 1:
        return steps * (wide - _of_inputs(offsets, weight))
    return steps * wide + _of_inputs(offsets, weight)


def _filled(values: Tensor, tiles: tuple[int, int], columns: int, filling: int) -> Tensor:
    """Values [N, *] filled up to whole tiles of 64 rows and `columns` columns."""
    down, right = tiles[0] * TILE_OUTPUTS - values.shape[0], tiles[1] * columns - values.shape[1]
    return F.pad(values, (0, right, 0, down), value=filling)


def _by_tile(values: Tensor, tiles: tuple[int, int], group: int, filling: int) -> Tensor:
    """One value of each group [N, groups] as [U, I, P, 64]."""
    grid = _filled(values, tiles, TILE_INPUTS // group, filling)
    return grid.view(tiles[0], TILE_OUTPUTS, tiles[1], -1).permute(0, 2, 3, 1).contiguous()


def _from_tiles(values: Tensor, weight: Weight4) -> Tensor:
    grid = values.permute(0, 3, 1, 2).reshape(values.shape[0] * TILE_OUTPUTS, -1)
    return grid[: weight.outputs, : -(-weight.inputs // weight.group)].contiguous()


def _of_inputs(values: Tensor, weight: Weight4) -> Tensor:
    """One value of each group [N, groups] as one of each input [N, C], in float64."""
    return values.double().repeat_interleave(weight.group, dim=1)[:, : weight.inputs]
