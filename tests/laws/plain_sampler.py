"""Sampling as a plain model says it: one stream, one token after the other, the whole text computed for each of them.

Rule: nothing here comes from the engine but raw logits and what a grammar permits. What is done to logits is
`shared.adjust`, which token is taken is `shared.noise`; how likely each was is reckoned here, without noise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from kernels.step import Decoder, StepInputs
from shared.adjust import adjusted
from shared.messages import Adjust, Generate, Sampling
from shared.noise import GREEDY_BELOW, choose
from shared.tokens import pack, unpack
from worker.grammar import GrammarState


class Chosen(NamedTuple):
    """One token, and how likely the model says every id was in its place."""

    token: int
    probabilities: NDArray[np.float64]
    logprob: float  # of the raw logits


def answer(request: Generate, decoder: Decoder, grammar: GrammarState | None = None) -> list[Chosen]:
    """The answer of a request, to its end. `grammar`: of its own, behind no token."""
    prompt, sampling = unpack(request.tokens), request.sampling
    said: list[Chosen] = []
    while len(said) < request.max_tokens:
        tokens = [chosen.token for chosen in said]
        raw = logits_behind(decoder, [*prompt, *tokens])
        logits = adjusted(raw, _wishes(request, grammar), prompt, tokens, request.stop_token_ids,
                          _permitted(grammar, raw))
        token = choose(logits, sampling.seed, len(prompt) + len(tokens), sampling.temperature, sampling.top_k,
                       sampling.top_p, sampling.min_p)
        wide = raw.astype(np.float64)
        said.append(Chosen(token, probabilities(logits, sampling),
                           float(wide[token] - wide.max() - math.log(np.exp(wide - wide.max()).sum()))))
        if token in request.stop_token_ids:
            break
        if grammar is not None:
            assert grammar.advance(token)
            if grammar.finished:
                break
    return said


def probabilities(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """How likely each id is: the softmax of logits over temperature, of the ids that top_k, top_p and min_p leave."""
    wide = logits.astype(np.float64)
    if sampling.temperature < GREEDY_BELOW:
        return (np.arange(len(wide)) == wide.argmax()).astype(np.float64)
    # as float32, in which equal is equal
    scaled = (logits / np.float32(sampling.temperature)).astype(np.float64)
    likely = np.exp(scaled - scaled.max())
    order = sorted(range(len(scaled)), key=lambda id: (-scaled[id], id))
    if sampling.top_k:
        order = order[:sampling.top_k]
    left, before = [], 0.0
    of_all = sum(likely[id] for id in order)
    for id in order:
        if left and sampling.top_p < 1.0 and before >= sampling.top_p * of_all:
            break
        left.append(id)
        before += likely[id]
    kept = [id for id in left if likely[id] >= sampling.min_p]
    found = np.zeros(len(wide))
    found[kept] = likely[kept] / sum(likely[id] for id in kept)
    return found


def logits_behind(decoder: Decoder, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Of the token behind all of these, computed from the first on."""
    count = len(tokens)
    blocks = np.arange(-(-count // decoder.block_size_tokens), dtype=np.int32)[None]
    found: NDArray[np.float32] = decoder.logits(StepInputs(
        tokens=np.array(tokens, np.int32), positions=np.arange(count, dtype=np.int32),
        sequence_starts=np.array([0, count], np.int32), block_tables=blocks,
        sample_rows=np.array([count - 1], np.int32), temperature=np.zeros(1, np.float32), top_k=np.zeros(1, np.int32),
        top_p=np.ones(1, np.float32), min_p=np.zeros(1, np.float32), seeds=np.zeros(1, np.uint64)))
    return found[0]


def _wishes(request: Generate, grammar: GrammarState | None) -> Adjust:
    """What is asked; and an end that a grammar knows, but that does not end this answer, is not wanted."""
    adjust = request.adjust or Adjust()
    ends = grammar.end_ids.difference(request.stop_token_ids) if grammar is not None else ()
    return replace(adjust, bad_words=(*adjust.bad_words, *(pack([id]) for id in ends)))


def _permitted(grammar: GrammarState | None, logits: NDArray[np.float32]) -> list[int] | None:
    if grammar is None:
        return None
    mask = np.zeros((1, -(-len(logits) // 32)), np.uint32)
    grammar.fill(mask, [])
    return [id for id in range(len(logits)) if mask[0, id // 32] >> np.uint32(id % 32) & 1]
