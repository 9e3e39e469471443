"""The GPU benchmark: its three ways are one model, its figures follow from times, and without a GPU it says so."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from deploy.bench import gpu
from deploy.bench.gpu_model import Shape, fused_step, naive_step, random_batch, random_model, unfused_step
from kernels.verify import Machine

TINY = Shape(layers=1, heads=4, kv_heads=2, head_dim=16, hidden=96, width=64, vocabulary=100)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_ways_of_a_step_choose_the_same_tokens() -> None:
    torch.manual_seed(0)
    model = random_model(TINY, "bf16", DEVICE, torch.float16)
    batch = random_batch(TINY, 3, 20, 1, DEVICE, torch.float16)
    expected = naive_step(model, batch)
    assert torch.equal(fused_step(model, batch), expected)
    assert torch.equal(unfused_step(model, batch), expected)


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_steps_of_fewer_bits_run(precision: str) -> None:
    torch.manual_seed(0)
    model = random_model(TINY, precision, DEVICE, torch.float16)
    batch = random_batch(TINY, 1, 5, 1, DEVICE, torch.float16)
    chosen = unfused_step(model, batch)
    assert ((chosen >= 0) & (chosen < TINY.vocabulary)).all()
    # With FP8 the operators one by one round activations to eight bits, which may choose another token.
    fused = fused_step(model, batch)
    assert torch.equal(fused, chosen) if precision == "int4" else (0 <= fused).all() and (fused < TINY.vocabulary).all()


def test_a_prompt_is_a_step_of_many_rows() -> None:
    torch.manual_seed(0)
    model, prompt = (
        random_model(TINY, "bf16", DEVICE, torch.float16),
        random_batch(TINY, 1, 7, 7, DEVICE, torch.float16),
    )
    assert unfused_step(model, prompt).shape == (1,)


def test_a_row_of_the_report_follows_from_its_times() -> None:
    model, batch = random_model(TINY, "bf16", DEVICE), random_batch(TINY, 3, 32, 1, DEVICE)
    weights = 2 * (96 * ((4 + 4) * 16 + 4 * 16 + 3 * 64) + 100 * 96)
    cache = 2 * 2 * 2 * 16 * 32 * 3
    assert model.bytes_per_step == weights
    row = gpu.row("tiny", "bf16", model, batch, 1e-3, 2.0, Machine(1e9, 1e12))
    assert row["decode_tok_s"] == 3000.0
    assert row["share_of_bandwidth"] == round((weights + cache) / 1e6, 3)
    assert row["prefill_tok_s"] == 1024
    assert set(row) == {
        "model",
        "precision",
        "batch",
        "decode_tok_s",
        "share_of_bandwidth",
        "prefill_tok_s",
        "share_of_matmul",
    }
    assert "3000 tok/s" in gpu.line(row)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is measured")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 2
    assert "Run it on a machine where torch.cuda.is_available() is true" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()
