"""A decoder without a model: tokens that depend on everything a model's tokens depend on.

Its KV cache is real in shape: the slot of a position holds a hash of all tokens up to there, written through the block
table and read back through it. The next token is a function of that hash, of the last slots of all full blocks before
it, and of the seed when sampling. A wrong block table, a lost token, a block reused for the wrong prompt: each changes
the stream, so that tests see in milliseconds what a model would only mumble about.

Rule: one pass of numpy for a step of any size. The hash of position p is the sum over j <= p of mix(token j) * ODD ** j
modulo 2**64, so rows of one step follow from each other by a running sum.
"""

import numpy as np
from numpy.typing import NDArray

from kernels.adjust import adjusted
from kernels.logprobs import fill
from kernels.step import StepInputs

ODD = np.uint64(0x9E3779B97F4A7C15)
# of so many tokens one depends on the whole stream; the others follow from the token before, as words in a phrase
PHRASE = np.uint64(8)
WORDS = 96
# byte-level vocabularies have whole words from about here on, so that a mock mesh streams text and not broken bytes
FIRST_WORD = 1024

Hashes = NDArray[np.uint64]

_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class MockDecoder:
    """Implements `kernels.step.Decoder` and `BlockStore`."""

    def __init__(self, *, blocks: int, block_size_tokens: int = 16, vocabulary_size: int = 49152,
                 context_length: int = 32768) -> None:
        self.vocabulary_size = vocabulary_size
        self.context_length = context_length
        self.block_size_tokens = block_size_tokens
        self.blocks = blocks
        self.recipe = f"mock-{vocabulary_size}"
        self._first = min(FIRST_WORD, vocabulary_size // 2)
        self._words = min(WORDS, vocabulary_size - self._first)
        rng = np.random.default_rng(0)
        # what follows each word, in a phrase that goes through all of them
        phrase = rng.permutation(self._words)
        self._follows = np.empty(self._words, np.uint64)
        self._follows[phrase] = np.roll(phrase, 1)
        self._mixed = mix(np.arange(vocabulary_size, dtype=np.uint64))
        self._powers = np.full(context_length, ODD, np.uint64).cumprod(dtype=np.uint64)
        # never zero, so that an unwritten slot is as visible as a wrong one
        self._kv: Hashes = rng.integers(1, 1 << 63, (blocks, block_size_tokens), np.uint64)

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        size = self.block_size_tokens
        tables, positions = inputs.block_tables, inputs.positions.astype(np.int64)
        starts = inputs.sequence_starts.astype(np.int64)
        self._check(inputs)
        sequences = np.arange(len(starts) - 1)
        one_each = len(positions) == len(sequences)
        sequence_of = sequences if one_each else np.repeat(sequences, np.diff(starts))
        # 1. the hash up to each row: what the cache says before the sequence's first row, and a running sum
        terms = self._mixed[inputs.tokens] * self._powers[positions]
        first = positions if one_each else positions[starts[:-1]]
        previous = np.maximum(first - 1, 0)
        held = self._kv[tables[sequences, previous // size], previous % size]
        before = held * (first > 0)
        if one_each:
            hashes = before + terms
        else:
            running = np.concatenate(([np.uint64(0)], terms.cumsum(dtype=np.uint64)))
            hashes = before[sequence_of] + running[1:] - running[starts[:-1]][sequence_of]
        # 2. keys and values
        self._kv[tables[sequence_of, positions // size], positions % size] = hashes
        # 3. attention: the row's own slot and the last slot of every full block up to it
        rows = inputs.sample_rows
        own, place = tables[sequence_of[rows]], positions[rows]
        full = np.arange(own.shape[1]) < ((place + 1) // size)[:, None]
        ends = self._kv[own * full, size - 1] * full
        state = self._kv[own[np.arange(len(rows)), place // size], place % size]
        state = mix(state + mix(np.bitwise_xor.reduce(ends, axis=1)))
        # 4. sampling
        sampled = inputs.temperature > 0
        seeded = mix(state ^ mix(inputs.seeds + ODD) * sampled if sampled.any() else state)
        word = (inputs.tokens[rows] - self._first).astype(np.int64) % self._words
        fresh = (seeded >> np.uint64(16)) % np.uint64(self._words)
        words = np.where(seeded % PHRASE == 0, fresh, self._follows[word])
        chosen = (words + np.uint64(self._first)).astype(np.int32)
        # 5. where logits are shifted, masked or told, there are some that every shift can change
        if inputs.adjustments is not None or inputs.logprobs is not None:
            logits = self._flat(seeded, chosen)
            if inputs.adjustments is not None:
                these = inputs.adjustments.samples
                chosen[these] = adjusted(logits, inputs.adjustments)[these].argmax(1)
            if inputs.logprobs is not None:
                fill(inputs.logprobs, logits, chosen)
        return chosen

    def _flat(self, seeded: Hashes, chosen: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [n, V] between 0 and 4 whose largest is 4.5, of the chosen one."""
        logits = (mix(seeded[:, None] ^ self._mixed) >> np.uint64(40)).astype(np.float32) * np.float32(2**-22)
        logits[np.arange(len(chosen)), chosen] = 4.5
        return logits

    def logits(self, inputs: StepInputs) -> NDArray[np.float32]:
        """One where the chosen token is, zero elsewhere."""
        chosen = self.step(inputs)
        logits = np.zeros((len(chosen), self.vocabulary_size), np.float32)
        logits[np.arange(len(chosen)), chosen] = 1.0
        return logits

    @property
    def block_bytes(self) -> int:
        """As `kernels.step.BlockStore`."""
        return self.block_size_tokens * self._kv.itemsize

    def read_block(self, block: int, to: NDArray[np.uint8]) -> None:
        """As `kernels.step.BlockStore`."""
        to.view(np.uint64)[:] = self._kv[block]

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """As `kernels.step.BlockStore`."""
        self._kv[block] = data.view(np.uint64)

    def _check(self, inputs: StepInputs) -> None:
        """Raises ValueError where a real device would read or write somebody else's memory."""
        # as unsigned numbers what is negative is large
        if inputs.tokens.view(np.uint32).max() >= self.vocabulary_size:
            raise ValueError("a token id outside the vocabulary")
        if inputs.positions.view(np.uint32).max() >= self.context_length:
            raise ValueError("a position outside the context")
        last = inputs.positions[inputs.sequence_starts[1:] - 1] // self.block_size_tokens
        if last.max() >= inputs.block_tables.shape[1]:
            raise ValueError("a block table shorter than its sequence")
        needed = np.arange(inputs.block_tables.shape[1]) <= last[:, None]
        if (inputs.block_tables.view(np.uint32) * needed).max() >= self.blocks:
            raise ValueError("a block table with a hole")


def mix(values: Hashes) -> Hashes:
    """A bijection of 64 bits that leaves no pattern (the finaliser of splitmix64)."""
    values = (values ^ (values >> _SHIFTS[0])) * _FACTORS[0]
    values = (values ^ (values >> _SHIFTS[1])) * _FACTORS[1]
    return values ^ (values >> _SHIFTS[2])
