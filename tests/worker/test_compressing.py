"""A checkpoint in fewer bits: it reads back as it was written, and whoever was killed ends with the same bytes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kernels.checkpoint import open_checkpoint
from kernels.config import CheckpointError
from kernels.decoder import TorchDecoder
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from tests.kernels.compressed import read_back, write_compressed_folder
from tests.kernels.families import FAMILIES
from tests.kernels.steps import Paged, step_inputs
from tests.kernels.tiny import Tiny, write_tiny_folder, write_tiny_gguf
from worker.compress import compressing
from worker.compress.compressing import Compression, OtherRun, Recipe, compress
from worker.compress.rounding import quantisation, rounded, scheme_for

SHAPE = Tiny(layers=3, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=256)
RECIPES = [
    *(Recipe(group=group, symmetric=symmetric) for group in (32, 64, 128) for symmetric in (True, False)),
    Recipe(bits=8),
]
PROMPT = np.random.default_rng(3).integers(0, 256, 9).tolist()


def quiet(*_: object) -> None: ...


def squeezed(model: Path, out: Path, recipe: Recipe | None = None) -> Compression:
    return compress(model, out, recipe or Recipe(), quiet)


def logits(decoder: TorchDecoder | NativeDecoder) -> np.ndarray:
    return decoder.logits(step_inputs([(Paged(list(PROMPT), [0]), len(PROMPT))], sample=[[0, 4, 8]]))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_weight_goes_to_the_nearest_code_of_its_scale(recipe: Recipe, dtype: torch.dtype) -> None:
    # outputs are no multiple of the eight zero points in a word
    weight = torch.randn(21, 256, generator=torch.Generator().manual_seed(1)) * 0.05 + 0.01
    parts = rounded(weight, scheme_for(recipe.bits, recipe.group, recipe.symmetric), dtype)
    scale = parts["weight_scale"].float()
    steps = scale.repeat_interleave(256 // scale.shape[1], 1)
    gap = (read_back(parts) - weight).abs() / steps
    # The ends of the range are cut off by what the scale lost when it was rounded, and by half a step on one side.
    assert float(gap.median()) < 0.3
    assert float((gap > 0.501).float().mean()) < 0.03 and float(gap.max()) < 0.75


def test_groups_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(4, 64)
    weight[1, :32] = 1e-12  # smaller than any scale
    for symmetric in (True, False):
        parts = rounded(weight, scheme_for(4, 32, symmetric), torch.bfloat16)
        assert torch.equal(read_back(parts), torch.zeros(4, 64))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_folder_opens_as_the_same_model_with_near_weights(tmp_path: Path, recipe: Recipe) -> None:
    source = write_tiny_folder(tmp_path / "source", SHAPE)
    done = squeezed(source, tmp_path / "out", recipe)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert after.config == before.config
    kind = scheme_for(recipe.bits, recipe.group, recipe.symmetric).kind
    for name in before.names():
        was, now = before.tensor(name), after.tensor(name)
        rounded_ = name.startswith("layers.") and was.dim() == 2
        assert after.kind(name) == (kind if rounded_ else "BF16")
        if rounded_:
            assert float((now - was).norm() / was.norm()) < (0.01 if recipe.bits == 8 else 0.13)
        else:
            assert torch.equal(now, was.bfloat16().float())
    assert done.bytes == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    name = "model.layers.1.mlp.up_proj"
    was, now = (checkpoint.tensor("layers.1.mlp.up.weight") for checkpoint in (before, after))
    assert done.errors[name] == pytest.approx(float((now - was).norm() / was.norm()), abs=2e-6)
    assert len(done.errors) == SHAPE.layers * 7


def test_rows_of_q_and_k_stand_as_safetensors_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF has them in another order; in a wrong one eight bits would give other logits."""
    source = write_tiny_gguf(tmp_path / "model.gguf", SHAPE)
    squeezed(source, tmp_path / "out", Recipe(bits=8))
    monkeypatch.setattr(compressing, "halves", lambda weight, name, config: weight)
    squeezed(source, tmp_path / "wrong", Recipe(bits=8))
    expected = logits(TorchDecoder.load(source, blocks=2))
    right, wrong = (float(np.abs(logits(TorchDecoder.load(tmp_path / name, blocks=2)) - expected).max())
                    for name in ("out", "wrong"))
    assert right < 0.1 * float(np.abs(expected).max()) < 0.15 * wrong


@pytest.mark.skipif(available() is not None, reason=str(available()))
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(bits=8)], ids=str)
def test_the_cpu_step_and_a_torch_decoder_of_four_bits_serve_it(tmp_path: Path, recipe: Recipe) -> None:
    squeezed(write_tiny_gguf(tmp_path / "model.gguf", SHAPE), tmp_path / "out", recipe)
    expected = logits(TorchDecoder.load(tmp_path / "out", blocks=2))
    near = 0.08 * float(np.abs(expected).max())
    np.testing.assert_allclose(logits(NativeDecoder.load(tmp_path / "out", blocks=2, threads=1)), expected, atol=near)
    kept = TorchDecoder.load(tmp_path / "out", blocks=2, dtype=torch.bfloat16, four_bits=True)
    np.testing.assert_allclose(logits(kept), expected, atol=near)


def test_whoever_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source = write_tiny_folder(tmp_path / "source", SHAPE)
    squeezed(source, tmp_path / "whole")
    program = (
        "import os, pathlib, signal, sys\n"
        "from worker.compress.compressing import Recipe, compress\n"
        "def report(phase, done, total, figures):\n"
        "    if done == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "compress(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), Recipe(), report)\n"
    )
    out = tmp_path / "killed"
    ended = subprocess.run([sys.executable, "-c", program, source, out], cwd=Path(__file__).parents[2])
    assert ended.returncode == -signal.SIGKILL
    assert sorted(file.name for file in out.glob("*.safetensors")) == [
        "model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    with pytest.raises(CheckpointError, match="holds no model"):
        open_checkpoint(out)
    (out / "model-00003-of-00004.part").write_bytes(b"half a layer")
    begun = [(file, file.stat().st_mtime_ns) for file in out.glob("*.safetensors")]
    squeezed(source, out)
    assert contents(out) == contents(tmp_path / "whole")
    assert all(file.stat().st_mtime_ns == written for file, written in begun)
    # Killed after the report was written, before what was needed on the way was gone.
    (out / "compression.begun").write_bytes(b"")
    (out / "model-00004-of-00004.errors").write_bytes(b"{}")
    assert squeezed(source, out) == squeezed(source, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    source = write_tiny_folder(tmp_path / "source", SHAPE)
    other = write_tiny_folder(tmp_path / "other", Tiny(layers=3, hidden=128, heads=4, head_dim=32, ffn=256, seed=9))
    squeezed(source, tmp_path / "out")
    before = contents(tmp_path / "out")
    for model, recipe in ((source, Recipe(group=32)), (other, Recipe())):
        with pytest.raises(OtherRun, match="another model or with another recipe"):
            squeezed(model, tmp_path / "out", recipe)
    assert contents(tmp_path / "out") == before
    with pytest.raises(OtherRun, match="holds other files"):
        squeezed(source, source)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(name="magic"), "recipe 'magic' is unknown: choose rtn"),
        (Recipe(bits=3), "3 bits in groups of 64 cannot be written"),
        (Recipe(group=48), "4 bits in groups of 32, 64, 128 can"),
        (Recipe(bits=8, symmetric=False), "leave out the zero points"),
    ],
)
def test_a_recipe_that_does_not_exist_is_refused_before_anything_is_written(tmp_path: Path, recipe: Recipe,
                                                                            reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        squeezed(write_tiny_folder(tmp_path / "source", SHAPE), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_inputs_that_are_no_whole_groups_are_refused_with_what_fits(tmp_path: Path) -> None:
    source = write_tiny_folder(tmp_path / "source", Tiny())
    with pytest.raises(ValueError, match="64 inputs are no whole groups of 128: choose 32 or 64"):
        squeezed(source, tmp_path / "out", Recipe(group=128))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen3_moe", "nemotron", "gpt_oss"])
def test_models_that_are_no_plain_decoders_are_refused(tmp_path: Path, family: str) -> None:
    source = write_tiny_folder(tmp_path / "source", FAMILIES[family])
    with pytest.raises(CheckpointError, match="cannot be compressed yet"):
        squeezed(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compressed_model_can_be_compressed_again(tmp_path: Path) -> None:
    source = write_compressed_folder(tmp_path / "source", "INT8")
    done = squeezed(source, tmp_path / "out")
    assert "INT8" in done.source_kinds
    assert open_checkpoint(tmp_path / "out").kind("layers.0.mlp.up.weight") == "INT4_G64"


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_library_reads_what_is_written(tmp_path: Path, recipe: Recipe) -> None:
    """Where it is installed; the project does without."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    squeezed(write_tiny_folder(tmp_path / "source", SHAPE), tmp_path / "out", recipe)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said == quantisation(scheme_for(recipe.bits, recipe.group, recipe.symmetric))
    scheme = quantization.QuantizationConfig.model_validate(said).config_groups["group_0"]
    compressor = compressors.BaseCompressor.get_value_from_registry(said["format"])
    name = "model.layers.1.mlp.up_proj."
    stored = load_file(tmp_path / "out" / "model-00003-of-00004.safetensors")
    parts = {key.removeprefix(name): tensor for key, tensor in stored.items() if key.startswith(name)}
    theirs = compressor.decompress(parts, scheme)["weight"]
    ours = open_checkpoint(tmp_path / "out").tensor("layers.1.mlp.up.weight")
    assert torch.equal(theirs, ours.to(theirs.dtype))
