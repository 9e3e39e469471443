"""A worker without a compiler keeps the recipe, so that streams can move to it and from it."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from structlog.testing import capture_logs

from kernels.decoder import TorchDecoder
from kernels.native import build
from kernels.native.decoder import NativeDecoder
from kernels.native.uncompiled import UncompiledDecoder
from shared.settings import WorkerSettings
from tests.kernels.blocks import WIDE
from tests.kernels.tiny import write_tiny_gguf
from worker.runner import load_decoder


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compiler", lambda: None)


def settings(model: Path, **more: object) -> WorkerSettings:
    return WorkerSettings(engine="cpu", model=str(model), kv_blocks=4, threads=1, **more)  # type: ignore[arg-type]


def test_without_a_compiler_the_recipe_stays_and_the_log_says_what_to_install(tmp_path: Path) -> None:
    with capture_logs() as logs:
        decoder = load_decoder(settings(write_tiny_gguf(tmp_path / "model.gguf")))
    assert isinstance(decoder, UncompiledDecoder)
    assert decoder.recipe == NativeDecoder.recipe
    assert [entry["event"] for entry in logs] == ["native_step_unavailable"]
    assert "pip install ziglang" in logs[0]["error"]
    assert "slower" in logs[0]["instead"]


def test_a_model_that_the_recipe_does_not_know_runs_in_float32(tmp_path: Path) -> None:
    twos = {"blk.0.attn_q.weight": (np.zeros((256, 84), np.uint8), Kind.Q2_K)}
    with capture_logs() as logs:
        decoder = load_decoder(settings(write_tiny_gguf(tmp_path / "model.gguf", WIDE, stored=twos)))
    assert isinstance(decoder, TorchDecoder)
    assert logs[-1]["event"] == "recipe_unavailable"
    assert "Q2_K" in logs[-1]["error"]


def test_a_kv_format_that_needs_the_compiler_is_not_replaced(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"KV format int8.*no C\+\+ compiler.*leave out --kv-format"):
        load_decoder(settings(model, kv_format="int8"))
