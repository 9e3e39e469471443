"""A decoder without a model: tokens that depend on everything a model's tokens depend on.

Its KV cache is real in shape: the slot of a position holds a hash of all tokens up to there, written through the block
table and read back through it. The next token is a function of that hash, of the last slots of all full blocks before
it, and of the seed when sampling. A wrong block table, a lost token, a block reused for the wrong prompt: each changes
the stream, so that tests see in milliseconds what a model would only mumble about.

Rule: one pass of numpy for a step of any size; but a few streams that decode go row by row, which gives the same and is
quicker. The hash of position p is the sum over j <= p of mix(token j) * ODD ** j modulo 2**64, so rows of one step
follow from each other by a running sum.
"""

import numpy as np
from numpy.typing import NDArray

from kernels.adjust import adjusted
from kernels.logprobs import fill
from kernels.step import StepInputs

ODD = np.uint64(0x9E3779B97F4A7C15)
# one token of eight depends on the whole stream; the others follow from the token before, as words in a phrase
IN_PHRASE, DRAW = np.uint64(7), np.uint64(16)
WORDS = 96
HIDDEN = 64
FEW = 8  # rows; one takes 4.5 us, a pass of numpy 43
# byte-level vocabularies have whole words from about here on, so that a mock mesh streams text and not broken bytes
FIRST_WORD = 1024

Hashes = NDArray[np.uint64]

_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_FIRST, _SECOND = map(int, _FACTORS)
_MASK, _ODD, _PHRASE, _DRAW = (1 << 64) - 1, int(ODD), int(IN_PHRASE), int(DRAW)


class MockDecoder:
    """Implements `kernels.step.Decoder`, `Streaks` and `BlockStore`."""

    def __init__(self, *, blocks: int, block_size_tokens: int = 16, vocabulary_size: int = 49152,
                 context_length: int = 32768) -> None:
        self.vocabulary_size = vocabulary_size
        self.hidden_size = min(HIDDEN, vocabulary_size)
        self.context_length = context_length
        self.block_size_tokens = block_size_tokens
        self._size = np.int64(block_size_tokens)
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
        self._kv: Hashes = rng.integers(1, 1 << 63, blocks * block_size_tokens, np.uint64)
        # the same memory, number by number
        self._numbers = tuple(each.data for each in (self._kv, self._mixed, self._powers, self._follows))

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        size, starts, tokens, rows = self._size, inputs.sequence_starts, inputs.tokens, inputs.sample_rows
        one_each = len(tokens) == len(starts) - 1
        if one_each and len(tokens) == len(rows) <= FEW and inputs.adjustments is None and inputs.logprobs is None \
                and inputs.hidden is None:
            return self._step_few(inputs)
        positions = inputs.positions.astype(np.int64)
        blocks, places = np.divmod(positions, size)
        self._check(inputs, blocks if one_each else blocks.take(starts[1:] - 1))
        tables = inputs.block_tables.ravel()
        numbers = np.arange(inputs.block_tables.shape[1])
        heads = np.arange(0, len(tables), len(numbers))  # where the table of each row's sequence begins
        first, first_heads = positions, heads
        if not one_each:
            first, heads = positions.take(starts[:-1]), np.repeat(heads, np.diff(starts))
        slots = tables.take(heads + blocks) * size + places
        # 1. the hash up to each row: what the cache says before the sequence's first row, and a running sum
        hashes = self._mixed.take(tokens) * self._powers.take(positions)
        block, place = np.divmod(np.maximum(first - 1, 0), size)
        before = self._kv.take(tables.take(first_heads + block) * size + place) * (first > 0)
        if one_each:
            hashes += before
        else:
            running = np.concatenate(([np.uint64(0)], hashes.cumsum(dtype=np.uint64)))
            hashes = np.repeat(before - running.take(starts[:-1]), np.diff(starts)) + running[1:]
        # 2. keys and values
        self._kv[slots] = hashes
        if inputs.hidden is not None:
            inputs.hidden.values[:] = self._hidden(hashes.take(inputs.hidden.rows))
        # 3. attention: the row's own slot and the last slot of every full block up to it
        own = inputs.block_tables
        if not one_each or len(rows) != len(positions):
            positions, tokens, slots = positions.take(rows), tokens.take(rows), slots.take(rows)
            own = tables.take(heads.take(rows)[:, None] + numbers)
        full = numbers < ((positions + 1) // size)[:, None]
        ends = self._kv.take(own * full * size + (size - 1)) * full
        state = self._kv.take(slots) + np.bitwise_xor.reduce(ends, axis=1) * ODD
        # 4. sampling
        sampled = inputs.temperature > 0
        if sampled.any():
            state ^= mix(inputs.seeds + ODD) * sampled
        state = mix(state)
        word = (tokens - self._first) % self._words
        words = np.where(state & IN_PHRASE, self._follows.take(word), (state >> DRAW) % np.uint64(self._words))
        chosen = words.astype(np.int32) + np.int32(self._first)
        # 5. where logits are shifted, masked or told, there are some that every shift can change
        if inputs.adjustments is not None or inputs.logprobs is not None:
            logits = self._flat(state, chosen)
            if inputs.adjustments is not None:
                these = inputs.adjustments.samples
                chosen[these] = adjusted(logits, inputs.adjustments)[these].argmax(1)
            if inputs.logprobs is not None:
                fill(inputs.logprobs, logits, chosen)
        return chosen

    def _step_few(self, inputs: StepInputs) -> NDArray[np.int32]:
        """`step` of a few sequences that decode, row by row."""
        size, chosen = self.block_size_tokens, []
        kv, mixed, powers, follows = self._numbers
        for table, token, position, temperature, seed in zip(
                inputs.block_tables.tolist(), inputs.tokens.tolist(), inputs.positions.tolist(),
                inputs.temperature.tolist(), inputs.seeds.tolist(), strict=True):
            block, place = divmod(position, size)
            needed = table[:max(block, 0) + 1]
            if not 0 <= token < self.vocabulary_size or not 0 <= position < self.context_length \
                    or block >= len(table) or min(needed) < 0 or max(needed) >= self.blocks:
                self._check(inputs, inputs.positions.astype(np.int64) // size)
            total = mixed[token] * powers[position]
            if position:
                behind, last = divmod(position - 1, size)
                total += kv[table[behind] * size + last]
            slot = table[block] * size + place
            kv[slot] = total & _MASK
            ends = 0
            for full in table[:(position + 1) // size]:
                ends ^= kv[full * size + size - 1]
            state = kv[slot] + ends * _ODD & _MASK
            if temperature > 0:
                state ^= _mix_one(seed + _ODD)
            state = _mix_one(state)
            word = (follows[(token - self._first) % self._words] if state & _PHRASE
                    else (state >> _DRAW) % self._words)
            chosen.append(word + self._first)
        return np.array(chosen, np.int32)

    def streak(self, inputs: StepInputs, lengths: list[int]) -> list[list[int]]:
        """As `kernels.step.Streaks`: what `step` says, with what stands before each row read once."""
        size, first, words, sampled = self.block_size_tokens, self._first, self._words, inputs.temperature > 0
        kv, mixed, powers, follows = self._numbers
        chosen = []
        for table, token, position, length, draws, seed in zip(
                inputs.block_tables.tolist(), inputs.tokens.tolist(), inputs.positions.tolist(), lengths,
                sampled.tolist(), inputs.seeds.tolist(), strict=True):
            # 1. what the cache says of the tokens before the row
            block, place = divmod(position, size)
            last = position + length - 1
            needed = table[:max(last // size, 0) + 1]
            if not 0 <= token < self.vocabulary_size or not 0 <= position <= last < self.context_length \
                    or last // size >= len(table) or min(needed) < 0 or max(needed) >= self.blocks:
                raise ValueError("a token, a position or a block outside what there is")
            total = ends = 0
            if position:
                behind, end = divmod(position - 1, size)
                total = kv[table[behind] * size + end]
            for full in table[:block]:
                ends ^= kv[full * size + size - 1]
            noise = _mix_one(seed + _ODD) if draws else 0
            # 2. one token after the other, each written before the next is computed
            stream = []
            for here in range(position, last + 1):
                total = total + mixed[token] * powers[here] & _MASK
                kv[table[block] * size + place] = total
                place += 1
                if place == size:
                    ends ^= total
                    block, place = block + 1, 0
                # `_mix_one`, without the call
                state = total + ends * _ODD & _MASK ^ noise
                state = (state ^ state >> 30) * _FIRST & _MASK
                state = (state ^ state >> 27) * _SECOND & _MASK
                state ^= state >> 31
                token = first + (follows[(token - first) % words] if state & _PHRASE else (state >> _DRAW) % words)
                stream.append(token)
            chosen.append(stream)
        return chosen

    def _flat(self, seeded: Hashes, chosen: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits [n, V] between 0 and 4 whose largest is 4.5, of the chosen one."""
        logits = (mix(seeded[:, None] ^ self._mixed) >> np.uint64(40)).astype(np.float32) * np.float32(2**-22)
        logits[np.arange(len(chosen)), chosen] = 4.5
        return logits

    def _hidden(self, hashes: Hashes) -> NDArray[np.float32]:
        """Numbers [n, HIDDEN] between -1 and 1 that depend on all tokens up to a row."""
        mixed = mix(hashes[:, None] ^ self._mixed[:HIDDEN]) >> np.uint64(40)
        return mixed.astype(np.float32) * np.float32(2**-23) - np.float32(1)

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
        to.view(np.uint64)[:] = self._kv[self._slots(block)]

    def write_block(self, block: int, data: NDArray[np.uint8]) -> None:
        """As `kernels.step.BlockStore`."""
        self._kv[self._slots(block)] = data.view(np.uint64)

    def _slots(self, block: int) -> slice:
        return slice(block * self.block_size_tokens, (block + 1) * self.block_size_tokens)

    def _check(self, inputs: StepInputs, last: NDArray[np.int64]) -> None:
        """Raises ValueError where a real device would read or write somebody else's memory.

        `last`: of each sequence the number of the block that its last row lies in.
        """
        # as unsigned numbers what is negative is large
        if np.maximum.reduce(inputs.tokens.view(np.uint32)) >= self.vocabulary_size:
            raise ValueError("a token id outside the vocabulary")
        if np.maximum.reduce(inputs.positions.view(np.uint32)) >= self.context_length:
            raise ValueError("a position outside the context")
        width = inputs.block_tables.shape[1]
        if np.maximum.reduce(last) >= width:
            raise ValueError("a block table shorter than its sequence")
        needed = np.arange(width) <= last[:, None]
        if np.maximum.reduce(inputs.block_tables.view(np.uint32) * needed, axis=None) >= self.blocks:
            raise ValueError("a block table with a hole")


def mix(values: Hashes) -> Hashes:
    """A bijection of 64 bits that leaves no pattern (the finaliser of splitmix64)."""
    mixed = values ^ (values >> _SHIFTS[0])
    mixed *= _FACTORS[0]
    mixed ^= mixed >> _SHIFTS[1]
    mixed *= _FACTORS[1]
    mixed ^= mixed >> _SHIFTS[2]
    return mixed


def _mix_one(value: int) -> int:
    """`mix` of one number."""
    value &= _MASK
    value = (value ^ value >> 30) * _FIRST & _MASK
    value = (value ^ value >> 27) * _SECOND & _MASK
    return value ^ value >> 31
