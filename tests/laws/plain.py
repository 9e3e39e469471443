"""A stream as the simplest loop gives it: one row at a time, blocks in order, nothing shared. The truth for law 1."""

from collections.abc import Sequence

import numpy as np

from kernels.step import Decoder, StepInputs
from shared.adjust import adjusted
from shared.messages import Adjust, Sampling
from worker.mock_decoder import DRAW, IN_PHRASE, ODD, MockDecoder


def plain_stream(
    decoder: Decoder, prompt: Sequence[int], sampling: Sampling, max_tokens: int, stop_token_ids: Sequence[int] = ()
) -> tuple[int, ...]:
    """The tokens of one request, ended by a stop token (delivered) or `max_tokens`."""
    tokens = list(prompt)
    table = np.arange(decoder.blocks, dtype=np.int32)[None, :]
    made: list[int] = []
    position = 0
    while len(made) < max_tokens and not (made and made[-1] in stop_token_ids):
        wanted = position == len(tokens) - 1
        chosen = decoder.step(
            StepInputs(
                tokens=np.array([tokens[position]], np.int32),
                positions=np.array([position], np.int32),
                sequence_starts=np.array([0, 1], np.int32),
                block_tables=table,
                sample_rows=np.arange(int(wanted), dtype=np.int32),
                temperature=np.full(int(wanted), sampling.temperature, np.float32),
                top_k=np.full(int(wanted), sampling.top_k, np.int32),
                top_p=np.full(int(wanted), sampling.top_p, np.float32),
                min_p=np.full(int(wanted), sampling.min_p, np.float32),
                seeds=np.full(int(wanted), sampling.seed, np.uint64),
            )
        )
        position += 1
        if wanted:
            tokens.append(int(chosen[0]))
            made.append(int(chosen[0]))
    return tuple(made)


def mock_stream(
    decoder: MockDecoder,
    prompt: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    stop_token_ids: Sequence[int] = (),
    adjust: Adjust | None = None,
) -> tuple[int, ...]:
    """`plain_stream` of the mock, said again without blocks, steps or arrays: thirty times as fast, for many seeds.

    What is adjusted is so by the specification, from the text alone.
    """
    size, words, first = decoder.block_size_tokens, decoder._words, decoder._first
    follows = decoder._follows.tolist()
    noise = _mix(sampling.seed + int(ODD)) if sampling.temperature > 0 else 0
    power, total, ends = 1, 0, 0
    tokens = list(prompt)
    made: list[int] = []
    position = 0
    while True:
        token = tokens[position]
        position += 1
        power = power * int(ODD) & _MASK
        total = total + _mix(token) * power & _MASK
        if position % size == 0:
            ends ^= total
        if position < len(tokens):
            continue
        if len(made) == max_tokens or (made and made[-1] in stop_token_ids):
            return tuple(made)
        seeded = _mix(total + ends * int(ODD) & _MASK ^ noise)
        word = follows[(token - first) % words] if seeded & int(IN_PHRASE) else (seeded >> int(DRAW)) % words
        chosen = word + first
        if adjust is not None:
            (logits,) = decoder._flat(np.array([seeded], np.uint64), np.array([chosen], np.int32))
            chosen = int(adjusted(logits, adjust, prompt, made, stop_token_ids).argmax())
        tokens.append(chosen)
        made.append(chosen)


_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)
