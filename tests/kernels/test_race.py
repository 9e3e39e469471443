"""A race names the token a step chooses and those that came close, by the rule of `shared/noise.py`; and a trimmed head
is the whole one less the ids it does not know, whose noise stays that of the id."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from safetensors.numpy import load_file, save_file

from kernels.checkpoint import open_checkpoint
from kernels.config import CheckpointError
from kernels.decoder import TorchDecoder
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from kernels.native.uncompiled import UncompiledDecoder
from kernels.step import Racing, StepInputs
from shared import noise
from tests.kernels.steps import Paged, step_inputs
from tests.kernels.tiny import Tiny, write_tiny_folder, write_tiny_gguf

NATIVE = pytest.param(NativeDecoder, marks=pytest.mark.skipif(available() is not None, reason=str(available())))
DECODERS = [NATIVE, UncompiledDecoder, TorchDecoder]
IDS = [3, 4, 9, 20, 21, 22, 40, 77, 78, 100, 101, 102, 103, 150, 180, 200, 201, 230, 254]
UNTIED = Tiny(tied_head=False)
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.6, "seed": 2**63 + 5},
    {"temperature": 1.0, "seed": 8, "top_k": 4},
    {"temperature": 1.3, "seed": 9, "top_p": 0.7, "min_p": 0.05},
]


def trimmed(folder: Path, ids: list[int] = IDS) -> Path:
    """The tiny model with only these rows of its head."""
    write_tiny_folder(folder, UNTIED)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = np.ascontiguousarray(weights["lm_head.weight"][ids])
    save_file(weights, folder / "model.safetensors")
    (folder / "d2t.json").write_text(json.dumps(ids))
    return folder


def rows_of(decoder: Any) -> StepInputs:
    """One step: a prompt with two rows wanted for each way of sampling."""
    random = np.random.default_rng(3)
    parts = [Paged(random.integers(0, 256, 5).tolist(), [number], **sampling)
             for number, sampling in enumerate(SAMPLINGS)]
    return step_inputs([(part, 5) for part in parts], [[2, 4]] * len(parts))


def expected(logits: np.ndarray, ids: list[int], inputs: StepInputs, places: int) -> list[tuple[list[int], np.ndarray]]:
    found = []
    for row, (values, at) in enumerate(zip(logits, inputs.sample_rows, strict=True)):
        tokens, scores = noise.race(values, ids, int(inputs.seeds[row]), int(inputs.positions[at]) + 1, places,
                                    float(inputs.temperature[row]), int(inputs.top_k[row]), float(inputs.top_p[row]),
                                    float(inputs.min_p[row]))
        found.append((tokens.tolist(), scores))
    return found


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_race_is_that_of_the_rule(kind: Any, whole: bool, tmp_path: Path) -> None:
    ids = list(range(256)) if whole else IDS
    folder = write_tiny_folder(tmp_path, UNTIED) if whole else trimmed(tmp_path)
    decoder = kind(open_checkpoint(folder), blocks=8)
    assert isinstance(decoder, Racing)
    inputs = rows_of(decoder)
    logits = decoder.logits(inputs)
    assert logits.shape == (len(inputs.sample_rows), len(ids))
    race = decoder.race(inputs, 6)
    for row, (tokens, scores) in enumerate(expected(logits, ids, inputs, 6)):
        assert race.tokens[row].tolist() == tokens + [-1] * (6 - len(tokens))
        np.testing.assert_allclose(race.scores[row, :len(tokens)], scores, rtol=1e-6)
    assert decoder.race(inputs, 1).tokens[:, 0].tolist() == race.tokens[:, 0].tolist() == decoder.step(inputs).tolist()


@pytest.mark.parametrize("kind", DECODERS)
def test_a_trimmed_head_has_the_rows_of_the_whole_one(kind: Any, tmp_path: Path) -> None:
    whole = kind(open_checkpoint(write_tiny_folder(tmp_path / "whole", UNTIED)), blocks=8)
    part = kind(open_checkpoint(trimmed(tmp_path / "part")), blocks=8)
    inputs = rows_of(whole)
    assert np.allclose(part.logits(inputs), whole.logits(inputs)[:, IDS], atol=1e-6)
    assert set(part.step(inputs).tolist()) <= set(IDS)


@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_a_race_is_the_same_for_any_number_of_threads(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(trimmed(tmp_path))
    one, three = (NativeDecoder(checkpoint, blocks=8, threads=threads) for threads in (1, 3))
    inputs = rows_of(one)
    first, other = one.race(inputs, 5), three.race(inputs, 5)
    assert first.tokens.tolist() == other.tokens.tolist()
    assert first.scores.tobytes() == other.scores.tobytes()


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("places", [0, 65])
def test_places_have_bounds(kind: Any, places: int, tmp_path: Path) -> None:
    decoder = kind(open_checkpoint(write_tiny_gguf(tmp_path / "m.gguf")), blocks=8)
    with pytest.raises(ValueError, match="1 to 64 places"):
        decoder.race(rows_of(decoder), places)


@pytest.mark.parametrize(("content", "what"), [
    ("{", "is no JSON"), ('{"a": 1}', "list of token ids"), ("[1, true]", "list of token ids"),
    ("[]", "must ascend"), ("[4, 3]", "must ascend"), ("[3, 3]", "must ascend"), ("[0, 256]", "must ascend"),
    ("[-1, 2]", "must ascend"), ("[1, 2, 3]", "shapes contradict"),
])
def test_a_damaged_list_of_ids_is_refused(content: str, what: str, tmp_path: Path) -> None:
    trimmed(tmp_path)
    (tmp_path / "d2t.json").write_text(content)
    with pytest.raises(CheckpointError, match=what):
        open_checkpoint(tmp_path)


def test_a_tied_head_cannot_be_trimmed(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path)
    (tmp_path / "d2t.json").write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="rows of its own"):
        open_checkpoint(tmp_path)


def test_matrices_may_lie_in_safetensors_as_blocks_of_int8(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path / "plain", UNTIED)
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    blocks = {name: quants.quantize(weight, Kind.Q8_0) if weight.ndim == 2 else weight
              for name, weight in weights.items()}
    folder = tmp_path / "blocks"
    folder.mkdir()
    save_file(blocks, folder / "model.safetensors")
    settings = json.loads((tmp_path / "plain" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "q8_0"}}))
    checkpoint = open_checkpoint(folder)
    name = "layers.1.mlp.down.weight"
    assert checkpoint.raw(name).kind == "Q8_0"
    assert checkpoint.shape(name) == (64, 128)
    stored = quants.dequantize(blocks["model.layers.1.mlp.down_proj.weight"], Kind.Q8_0)
    assert np.array_equal(checkpoint.tensor(name).numpy(), stored)
    rounded = TorchDecoder(checkpoint, blocks=8).logits(rows_of(None))
    if available() is None:
        native = NativeDecoder(checkpoint, blocks=8).logits(rows_of(None))
        assert np.abs(native - rounded).max() < 0.05 * np.abs(rounded).max()
