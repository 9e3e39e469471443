"""One step of a decoder, as data: what the engine hands to the device and what it gets back.

Every decoder (torch over the operator table, native CPU, CUDA) has the same face, so the engine never asks which it
has.

R rows (tokens to run), S sequences, L rows whose next token is wanted, B the longest block table of the step, H rows of
the head: the vocabulary, or the part of it that a trimmed head knows.
Rows of one sequence stand together in position order. Prefill, decode and verification differ in nothing but the number
of rows a sequence has. Row r attends to positions 0..positions[r] of its sequence; its keys and values are written to
block `block_tables[s, positions[r] // block_size]`, slot `positions[r] % block_size`, before anything is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Adjustments:
    """What is done to the logits of some sample rows before a token is chosen, in the order of the fields.

    A adjusted rows, C counted ids, N shifted ids, M masks of W words. The ids of one row lie between two entries of
    `..._starts`, each once. Every operation is one float32 operation, correctly rounded:

        x > 0 ? x / repetition : x * repetition         of counted ids
        x - frequency * count,  then  x - presence      of counted ids whose count is above 0
        x + shift                                       of shifted ids; minus infinity: never chosen
        minus infinity                                  of ids whose bit of the mask is 0, or that have none
    """

    samples: NDArray[np.int32]  # [A] ascending; which of the L sample rows these are
    repetition: NDArray[np.float32]  # [A] 1: off
    frequency: NDArray[np.float32]  # [A] 0: off
    presence: NDArray[np.float32]  # [A] 0: off
    count_starts: NDArray[np.int32]  # [A + 1]
    counted: NDArray[np.int32]  # [C] ids that stand before the token to choose
    counts: NDArray[np.int32]  # [C] how often each was generated; 0: it stands in the prompt alone
    shift_starts: NDArray[np.int32]  # [A + 1]
    shifted: NDArray[np.int32]  # [N] ids
    shifts: NDArray[np.float32]  # [N]
    mask_of: NDArray[np.int32]  # [A] row of `masks`; -1: none
    masks: NDArray[np.uint32]  # [M, W] bit i % 32 of word i // 32: id i may be chosen
    fill: Callable[[], None] | None = None  # writes `masks`: to be called once the layers are under way, or before


@dataclass(slots=True)
class Logprobs:
    """How likely tokens were: asked with a step, filled by it (`kernels.logprobs`). P rows, the K likeliest ids."""

    samples: NDArray[np.int32]  # [P] ascending; which of the L sample rows these are
    targets: NDArray[np.int32]  # [P] the token meant; -1: the one that this step chooses
    of_target: NDArray[np.float32]  # [P] filled: log of its probability
    ranks: NDArray[np.int32]  # [P] filled: 1 for the likeliest
    top_ids: NDArray[np.int32]  # [P, K] filled: likeliest first, equal ones by id
    top: NDArray[np.float32]  # [P, K] filled

    @classmethod
    def asked(cls, samples: list[int], targets: list[int], most: int) -> "Logprobs":
        """A question without its answer."""
        rows = len(samples)
        return cls(
            np.array(samples, np.int32),
            np.array(targets, np.int32),
            np.zeros(rows, np.float32),
            np.zeros(rows, np.int32),
            np.zeros((rows, most), np.int32),
            np.zeros((rows, most), np.float32),
        )


@dataclass(slots=True)
class Hidden:
    """What a decoder makes of some rows before the head: asked with a step, filled by it. E rows."""

    rows: NDArray[np.int32]  # [E] ascending; which of the R rows these are
    values: NDArray[np.float32]  # [E, hidden] filled: the last layer's output behind the final norm

    @classmethod
    def asked(cls, rows: list[int], size: int) -> "Hidden":
        """A question without its answer. `size`: the decoder's `hidden_size`."""
        return cls(np.array(rows, np.int32), np.zeros((len(rows), size), np.float32))


@dataclass(slots=True)
class StepInputs:
    tokens: NDArray[np.int32]  # [R] token ids
    positions: NDArray[np.int32]  # [R] absolute positions, from 0
    sequence_starts: NDArray[np.int32]  # [S + 1] first row of each sequence; the last entry is R
    block_tables: NDArray[np.int32]  # [S, B] KV block ids, -1 beyond a sequence's end
    sample_rows: NDArray[np.int32]  # [L] ascending
    temperature: NDArray[np.float32]  # [L] 0: greedy
    top_k: NDArray[np.int32]  # [L] 0: off
    top_p: NDArray[np.float32]  # [L] 1: off
    min_p: NDArray[np.float32]  # [L] 0: off
    seeds: NDArray[np.uint64]  # [L]
    adjustments: Adjustments | None = None  # None: no row has any
    logprobs: Logprobs | None = None  # filled by `step`
    hidden: Hidden | None = None  # filled by `step`

    # The noise of a sampled token is keyed by the position it will have: positions[sample_rows] + 1.


class Decoder(Protocol):
    """A model on a device with a paged KV cache of its own."""

    vocabulary_size: int
    context_length: int
    block_size_tokens: int
    blocks: int  # KV blocks 0..blocks-1
    recipe: str  # names the arithmetic: equal recipes give equal tokens

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        """Run one step; the chosen token of each of the L sample rows. Blocking; one call at a time."""

    def logits(self, inputs: StepInputs) -> NDArray[np.float32]:
        """Run one step; the raw logits [L, H] instead of tokens (tests, certificates)."""


class Race(NamedTuple):
    """Who could be the token, best first: the one a step chooses, then the ones it would choose without those."""

    tokens: NDArray[np.int32]  # [L, places] ids; -1 past the last that may be chosen
    scores: NDArray[np.float32]  # [L, places] what the choice compares: logit / temperature + noise; greedy: the logit


MOST_PLACES = 64


def check_places(places: int) -> None:
    if not 1 <= places <= MOST_PLACES:
        raise ValueError(f"a race has 1 to {MOST_PLACES} places, got {places}")


@runtime_checkable
class Racing(Protocol):
    """A decoder that also says who came close."""

    def race(self, inputs: StepInputs, places: int) -> Race:
        """Run one step; the best `places` of each sample row. Blocking; one call at a time."""


@runtime_checkable
class Embedding(Protocol):
    """A decoder that fills `StepInputs.hidden`."""

    @property
    def hidden_size(self) -> int:
        """Numbers of a row."""


def check_hidden(hidden: Hidden, rows: int, size: int) -> None:
    """Raise ValueError, which says what does not fit a step of so many rows."""
    asked, values = hidden.rows, hidden.values
    for name, array, kind, shape in (("rows", asked, np.int32, (len(asked),)),
                                     ("values", values, np.float32, (len(asked), size))):
        if array.shape != shape or array.dtype != kind or not array.flags.c_contiguous:
            raise ValueError(f"{name} of hidden must be {shape} of {np.dtype(kind)}, contiguous")
    if (np.diff(asked) <= 0).any() or ((asked < 0) | (asked >= rows)).any():
        raise ValueError(f"hidden rows must be ascending numbers below {rows}")


@runtime_checkable
class Ahead(Protocol):
    """A decoder that takes a step before the tokens of the one before it are known. Blocking; one call at a time."""

    def submit(self, inputs: StepInputs, carried: NDArray[np.int32] | None = None) -> Any:
        """Begin a step, at most one beyond the one under way; what to `collect`, in the same order.

        `carried` [R]: which sample of the step submitted before chooses a row's token; -1: `inputs.tokens` says it.
        """

    def collect(self, step: Any) -> NDArray[np.int32]:
        """Wait for the chosen tokens."""


@runtime_checkable
class Streaks(Protocol):
    """A decoder that goes on by itself: several tokens of each stream in one call."""

    def streak(self, inputs: StepInputs, lengths: list[int]) -> list[list[int]]:
        """`step` of sequences with one row each, again and again: a row's next token is the one it has just chosen.

        `lengths` [S], each 1 or more: so many tokens of each sequence, which are returned. Block tables reach as far as
        `positions + lengths`; nothing is adjusted and no likelihood asked for. Blocking; one call at a time.
        """


@runtime_checkable
class BlockStore(Protocol):
    """A decoder whose KV blocks can be copied out and in again, between steps. Bytes mean nothing to anyone else."""

    @property
    def block_bytes(self) -> int:
        """Size of one block."""

    def read_block(self, block: int, to: NDArray[np.uint8]) -> None:
        """Copy all layers' keys and values of a block to `to` [block_bytes]. Blocking."""

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """Make `block` what it was, or another was, when `data` was read. Blocking."""
