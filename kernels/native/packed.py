"""Weight matrices packed in memory, multiplied by torch: the recipe's linear layers without a compiler.

A matrix lies in panels of outputs, inputs before outputs, in the checkpoint's own bits: 4 or 8 for a weight on a grid
and fp16 (MXFP4: an exponent) for its scale and minimum, or the float format it came in. A panel is spread out to
float32 only while in use.

A dot product of 32 weights and 32 activations is an integer below 2^24, so a float32 product of matrices has it
exactly, in whatever order torch adds. What follows, groups added in order, is `fused.chain`.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.checkpoint import Raw
from kernels.native.fused import Doubles, Floats, chain
from kernels.native.grids import BLOCK_BYTES, E8M0, FP4, GROUP, SUPER_KINDS, fours, taken_apart

PANEL_OUTPUTS = 3072
# Numbers that a step of a chain takes together. On a Zen 3 core with 512 KB of L2, 4,096 to 16,384 were alike.
TOGETHER = 8192
FLOAT_INPUTS = 64  # terms of a chain over float weights that are made at once

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = (*FLOATS, *BLOCK_BYTES)
_FOURS, _EXPONENTS = torch.from_numpy(FP4).float(), torch.from_numpy(E8M0)


class Activations(NamedTuple):
    """Rows as linear layers read them: int8 per group of 32, and as they were."""

    rows: Floats  # [R, inputs]
    q: Tensor  # [groups, R, 32] float32 integers
    steps: Floats  # [groups, R]
    sums: Doubles  # [groups, R] step * sum of q, rounded to float32

    def some(self, rows: NDArray[np.intp]) -> "Activations":
        return Activations(self.rows[rows], self.q[:, torch.from_numpy(rows)], self.steps[:, rows], self.sums[:, rows])


def quantised(rows: Floats) -> Activations:
    """As `specification.quantised`, of every group of every row."""
    groups = rows.reshape(len(rows), -1, GROUP).swapaxes(0, 1)
    steps = np.abs(groups).max(-1) / np.float32(127)
    steps[steps < np.finfo(np.float32).tiny] = 0
    q = np.rint(groups / np.where(steps == 0, np.float32(np.inf), steps)[..., None])
    sums = steps * q.sum(-1)  # integers below 2^13: exact
    return Activations(rows, torch.from_numpy(np.ascontiguousarray(q)), steps, sums.astype(np.float64))


class Matrix(Protocol):
    def times(self, x: Activations) -> Floats:
        """[R, outputs]"""

    def rows(self, outputs: NDArray[np.int32]) -> Floats:
        """The weights [len(outputs), inputs] of some outputs."""


def stacked(parts: Iterable[Raw]) -> list[Matrix]:
    """Matrices that read the same input, as few as they can be: neighbours of one kind are one."""
    found: list[Matrix] = []
    for kind, alike in groupby(parts, key=lambda part: part.kind):
        rows = np.concatenate([part.rows for part in alike])
        found.append(Plain(kind, rows) if kind in FLOATS else Grid(kind, rows))
    return found


class _Panel(NamedTuple):
    q: Tensor  # [groups, 16, outputs] two in a byte, uint8, or [groups, 32, outputs] int8
    scales: Tensor  # [groups, 1, outputs] fp16, float32 where fp16 does not hold them, or uint8: an exponent of MXFP4
    minima: Tensor | None
    halves: Tensor | None  # [groups, 2, outputs] int8, which multiply the halves of a group


class Grid:
    """scale * q + minimum per group of 32 inputs."""

    def __init__(self, kind: str, rows: NDArray[np.uint8]) -> None:
        self.outputs = len(rows)
        self.panels = [_panel(kind, rows[first:last]) for first, last in _spans(len(rows), PANEL_OUTPUTS)]

    def times(self, x: Activations) -> Floats:
        out = np.empty((len(x.rows), self.outputs), np.float32)
        for panel, (first, last) in zip(self.panels, _spans(self.outputs, PANEL_OUTPUTS), strict=True):
            dots = torch.bmm(x.q, _spread(panel)).numpy()  # [groups, R, outputs]
            scales = _scales(panel).numpy()
            minima = None if panel.minima is None else panel.minima.double().numpy()
            for row, end in _spans(len(x.rows), max(1, TOGETHER // (last - first))):
                steps, sums = x.steps[:, row:end, None], x.sums[:, row:end, None]
                terms = np.empty((len(dots), 1 if minima is None else 2, end - row, last - first))
                np.multiply(scales * steps, dots[:, row:end], out=terms[:, 0], dtype=np.float64)
                if minima is not None:
                    np.multiply(minima, sums, out=terms[:, 1])
                out[row:end, first:last] = chain(terms.reshape(-1, end - row, last - first), coarse=True)
        return out

    def rows(self, outputs: NDArray[np.int32]) -> Floats:
        return np.array([self._row(int(output)) for output in outputs], np.float32).reshape(len(outputs), -1)

    def _row(self, output: int) -> Floats:
        panel, at = self.panels[output // PANEL_OUTPUTS], slice(output % PANEL_OUTPUTS, output % PANEL_OUTPUTS + 1)
        column = _Panel(*(None if part is None else part[..., at] for part in panel))
        scaled = _spread(column).double() * _scales(column).double()
        if panel.minima is not None:
            scaled += panel.minima[..., at].double()
        row: Floats = scaled.float().numpy().reshape(-1)
        return row


class Plain:
    """Weights in a float format."""

    def __init__(self, kind: str, rows: NDArray[np.uint8]) -> None:
        stored = torch.from_numpy(np.array(rows)).view(FLOATS[kind])
        self.weights = stored.T.contiguous()  # [inputs, outputs]
        self._coarse = kind == "F16"

    def times(self, x: Activations) -> Floats:
        inputs, outputs = self.weights.shape
        out = np.zeros((len(x.rows), outputs), np.float32)
        columns = x.rows.T.astype(np.float64)[:, :, None]  # [inputs, R, 1]
        for first, last in _spans(outputs, PANEL_OUTPUTS):
            for k, next_k in _spans(inputs, FLOAT_INPUTS):
                weights = self.weights[k:next_k, None, first:last].double().numpy()
                for row, end in _spans(len(x.rows), max(1, TOGETHER // (last - first))):
                    terms = weights * columns[k:next_k, row:end]
                    out[row:end, first:last] = chain(terms, out[row:end, first:last], coarse=self._coarse)
        return out

    def rows(self, outputs: NDArray[np.int32]) -> Floats:
        rows: Floats = self.weights.T[torch.from_numpy(outputs).long()].float().numpy()
        return rows


def _panel(kind: str, rows: NDArray[np.uint8]) -> _Panel:
    if kind == "MXFP4":
        nibbles, exponents = fours(rows)
        return _Panel(_paired(nibbles), _columns(exponents), None, None)
    grid = taken_apart(kind, rows)
    codes = _paired(grid.codes) if kind.startswith("Q4") else _inputs_first(grid.codes)
    scales, minima = _columns(grid.scales), None if grid.minima is None else _columns(grid.minima)
    if kind not in SUPER_KINDS:
        scales, minima = scales.half(), None if minima is None else minima.half()
    return _Panel(codes, scales, minima, None if grid.halves is None else _inputs_first(grid.halves))


def _inputs_first(codes: NDArray[np.int8]) -> Tensor:
    """[outputs, groups, n] as [groups, n, outputs]."""
    return torch.from_numpy(np.ascontiguousarray(codes.transpose(1, 2, 0)))


def _paired(codes: NDArray[np.int8]) -> Tensor:
    low, high = _inputs_first(codes).view(torch.uint8).chunk(2, 1)
    return low | high << 4


def _columns(values: NDArray[np.generic]) -> Tensor:
    """[outputs, groups] as [groups, 1, outputs]."""
    return torch.from_numpy(np.ascontiguousarray(values.T[:, None]))


def _scales(panel: _Panel) -> Tensor:
    """Float32 [groups, 1, outputs]."""
    return _EXPONENTS[panel.scales.int()] if panel.scales.dtype == torch.uint8 else panel.scales.float()


def _spread(panel: _Panel) -> Tensor:
    """The integers [groups, 32, outputs] as float32."""
    q = panel.q
    if q.dtype == torch.int8:
        spread = q.float()
    else:
        spread = torch.empty(len(q), GROUP, q.shape[-1])
        spread[:, : GROUP // 2] = q & 15
        spread[:, GROUP // 2 :] = q >> 4
    if panel.scales.dtype == torch.uint8:
        return _FOURS[spread.int()]
    return spread if panel.halves is None else spread * panel.halves.float().repeat_interleave(GROUP // 2, 1)


def _spans(count: int, most: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + most, count)) for first in range(0, count, most))
