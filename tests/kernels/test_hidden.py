"""What a decoder makes of rows before its head: the specification's bits, whatever stands beside them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.checkpoint import open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.native.build import INSTRUCTIONS, available, missing_features
from kernels.native.decoder import NativeDecoder
from kernels.native.specification import SpecifiedDecoder
from kernels.native.uncompiled import UncompiledDecoder
from kernels.step import Decoder, Embedding, Hidden, StepInputs
from tests.kernels.families import FAMILIES
from tests.kernels.test_native_step import BLOCKS, PROMPT, TABLE, Part, same_bits, step_of
from tests.kernels.tiny import write_tiny_folder, write_tiny_gguf
from worker.mock_decoder import MockDecoder

needs_compiler = pytest.mark.skipif(available() is not None, reason=str(available()))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "model.gguf")


def asked(rows: list[int], size: int, *parts: Part, samples: list[int] | None = None) -> StepInputs:
    inputs = step_of(*parts, samples=[] if samples is None else samples)
    inputs.hidden = Hidden.asked(rows, size)
    return inputs


def hidden(decoder: Decoder, rows: list[int], *parts: Part) -> NDArray[np.float32]:
    """Of these rows of a step in which no token is wanted."""
    assert isinstance(decoder, Embedding)
    inputs = asked(rows, decoder.hidden_size, *parts)
    assert len(decoder.step(inputs)) == 0 and inputs.hidden is not None
    return inputs.hidden.values


ALL = list(range(len(PROMPT)))
WHOLE = PROMPT, 0, TABLE


@needs_compiler
@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_the_rows_are_the_specification_s_to_the_bit(tiny: Path, instructions: str) -> None:
    if missing := missing_features(instructions):
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    checkpoint = open_checkpoint(tiny)
    told = asked(ALL, checkpoint.config.hidden, WHOLE)
    SpecifiedDecoder(checkpoint, blocks=BLOCKS).logits(told)
    assert told.hidden is not None and told.hidden.values.any(1).all()
    decoder = NativeDecoder(checkpoint, blocks=BLOCKS, threads=2, instructions=instructions)
    assert same_bits(hidden(decoder, ALL, WHOLE), told.hidden.values)


@needs_compiler
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_s_rows_are_the_same_with_a_compiler_and_without(tmp_path: Path, family: str) -> None:
    shape = FAMILIES[family]
    path = write_tiny_folder(tmp_path, shape)
    checkpoint = open_checkpoint(path)
    prompt = [token % shape.vocabulary for token in PROMPT], 0, TABLE
    native = hidden(NativeDecoder(checkpoint, blocks=BLOCKS, threads=2), ALL, prompt)
    assert same_bits(hidden(UncompiledDecoder(checkpoint, blocks=BLOCKS), ALL, prompt), native)
    # int8 activations aside, a row's direction is what float32 makes of it; not where a router was near a tie
    plain = hidden(TorchDecoder(checkpoint, blocks=BLOCKS), ALL, prompt)
    cosines = (plain * native).sum(1) / np.linalg.norm(plain, axis=1) / np.linalg.norm(native, axis=1)
    assert np.median(cosines) > 0.999, cosines


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_does_not_depend_on_what_stands_beside_it_nor_on_the_cut(tiny: Path, threads: int) -> None:
    checkpoint = open_checkpoint(tiny)
    alone = hidden(NativeDecoder(checkpoint, blocks=BLOCKS, threads=1), ALL, WHOLE)
    decoder = NativeDecoder(checkpoint, blocks=BLOCKS, threads=threads)
    found = []
    for at, end in ((0, 1), (1, 20), (20, 36), (36, 37)):
        others = [(PROMPT[::-1][:5], 0, (7,)), (PROMPT[3:20], 0, (8, 9))]
        inputs = asked([5 + row for row in range(end - at)], decoder.hidden_size, others[0],
                       (PROMPT[at:end], at, TABLE), others[1], samples=[4, 4 + end - at])
        assert len(decoder.step(inputs)) == 2 and inputs.hidden is not None
        found.append(inputs.hidden.values)
    assert same_bits(np.concatenate(found), alone)


@needs_compiler
def test_rows_of_several_passes_are_told_each_in_its_place(tiny: Path) -> None:
    prompt, table = np.random.default_rng(3).integers(0, 256, 330).tolist(), list(range(21))
    checkpoint = open_checkpoint(tiny)
    rows = [0, 1, 127, 128, 129, 255, 256, 300, 329]
    every = hidden(NativeDecoder(checkpoint, blocks=BLOCKS, threads=2), list(range(330)), (prompt, 0, table))
    some = hidden(NativeDecoder(checkpoint, blocks=BLOCKS, threads=2), rows, (prompt, 0, table))
    assert same_bits(some, every[rows])


@needs_compiler
def test_asking_changes_no_token(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    for decoder in (NativeDecoder(checkpoint, blocks=BLOCKS), UncompiledDecoder(checkpoint, blocks=BLOCKS),
                    TorchDecoder(checkpoint, blocks=BLOCKS)):
        plain = decoder.step(step_of(WHOLE, samples=[3, 36]))
        assert (decoder.step(asked(ALL, decoder.hidden_size, WHOLE, samples=[3, 36])) == plain).all()


def test_the_head_reads_what_is_told(tiny: Path) -> None:
    decoder = TorchDecoder(open_checkpoint(tiny), blocks=BLOCKS)
    inputs = asked(ALL, decoder.hidden_size, WHOLE, samples=ALL)
    logits = decoder.logits(inputs)
    assert inputs.hidden is not None
    again = torch.from_numpy(inputs.hidden.values) @ decoder.head.T
    np.testing.assert_allclose(logits, again.numpy(), atol=1e-5)


def test_the_mock_s_rows_depend_on_all_tokens_before_them_and_on_none_behind() -> None:
    def rows(prompt: list[int]) -> NDArray[np.float32]:
        return hidden(MockDecoder(blocks=BLOCKS), ALL, (prompt, 0, TABLE))

    plain, changed = rows(PROMPT), rows([*PROMPT[:10], 999, *PROMPT[11:]])
    assert (plain[:10] == changed[:10]).all() and (plain[10:] != changed[10:]).any(1).all()
    decoder = MockDecoder(blocks=BLOCKS)
    cut = [hidden(decoder, list(range(end - at)), (PROMPT[at:end], at, TABLE)) for at, end in ((0, 7), (7, 8), (8, 37))]
    assert (np.concatenate(cut) == plain).all() and np.abs(plain).max() <= 1


@pytest.mark.parametrize(("rows", "short", "what"), [([3, 3], 0, "ascending"), ([37], 0, "below 37"),
                                                     ([-1], 0, "below 37"), ([3], 1, "values of hidden must be")])
def test_a_question_that_does_not_fit_is_refused(tiny: Path, rows: list[int], short: int, what: str) -> None:
    checkpoint = open_checkpoint(tiny)
    decoders = [UncompiledDecoder(checkpoint, blocks=BLOCKS), TorchDecoder(checkpoint, blocks=BLOCKS)]
    for decoder in [*decoders, *([] if available() else [NativeDecoder(checkpoint, blocks=BLOCKS)])]:
        with pytest.raises(ValueError, match=what):
            decoder.step(asked(rows, decoder.hidden_size - short, WHOLE))
