"""Ranks as processes: they start, compute together, and end, whatever happens to one of them."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kernels.checkpoint import open_checkpoint
from kernels.native.build import available
from kernels.native.decoder import NativeDecoder
from kernels.ranks import RankLost
from kernels.step import Embedding
from shared.settings import WorkerSettings
from tests.kernels.steps import mixed_sampling
from tests.kernels.test_hidden import hidden
from tests.kernels.test_native_step import same_bits, step_of
from tests.kernels.tiny import write_tiny_folder, write_tiny_gguf
from worker.ranks import RankedDecoder
from worker.runner import load_decoder

BLOCKS = 12
TABLE = (7, 2, 11, 0, 5)
PROMPT = np.random.default_rng(3).integers(0, 256, 40).tolist()
pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))


@contextmanager
def ranked(model: Path, **more: object) -> Iterator[RankedDecoder]:
    settings = WorkerSettings(model=str(model), **({"engine": "cpu", "tensor_parallel": 2, "kv_blocks": BLOCKS,
                                                    "threads": 2, "rank_timeout_s": 20.0} | more))
    decoder = load_decoder(settings)
    assert isinstance(decoder, RankedDecoder)
    try:
        yield decoder
    finally:
        decoder.close()
    assert not any(alive(pid) for pid in decoder.others.pids)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_processes_make_the_bits_and_tokens_of_one(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "model.gguf")
    alone = NativeDecoder(open_checkpoint(model), blocks=BLOCKS, threads=1)
    inputs = step_of((PROMPT, 0, TABLE), samples=range(len(PROMPT)))
    with ranked(model) as decoder:
        assert (decoder.recipe, decoder.blocks) == (alone.recipe, alone.blocks)
        assert same_bits(decoder.logits(inputs), alone.logits(inputs))
        for seed in range(5):
            assert decoder.step(mixed_sampling(seed)).tolist() == alone.step(mixed_sampling(seed)).tolist()
        assert isinstance(decoder, Embedding)
        every = list(range(len(PROMPT)))
        assert same_bits(hidden(decoder, every, (PROMPT, 0, TABLE)), hidden(alone, every, (PROMPT, 0, TABLE)))


def test_the_reference_runs_on_ranks_too(tmp_path: Path) -> None:
    model = write_tiny_folder(tmp_path / "model")
    inputs = step_of((PROMPT, 0, TABLE), samples=range(len(PROMPT)))
    alone = load_decoder(WorkerSettings(model=str(model), engine="reference", kv_blocks=BLOCKS))
    with ranked(model, engine="reference") as decoder:
        assert decoder.recipe == "float32-tp2"
        assert decoder.step(inputs).tolist() == alone.step(inputs).tolist()
        whole = PROMPT, 0, TABLE
        np.testing.assert_allclose(hidden(decoder, [0, 39], whole), hidden(alone, [0, 39], whole), atol=1e-4)


def test_a_step_that_is_refused_leaves_the_ranks_together(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "model.gguf")
    good, bad, worse = (step_of((PROMPT, 0, TABLE)) for _ in range(3))
    bad.tokens[3] = 256
    worse.temperature[0] = np.nan
    with ranked(model) as decoder:
        expected = decoder.step(good).tolist()
        for inputs in (bad, worse):
            with pytest.raises(ValueError):
                decoder.step(inputs)
        assert decoder.step(good).tolist() == expected


def test_a_rank_that_is_killed_is_named_and_nobody_waits_for_it(tmp_path: Path) -> None:
    heard: list[str] = []
    told = threading.Event()
    with ranked(write_tiny_gguf(tmp_path / "model.gguf"), tensor_parallel=4) as decoder:
        decoder.others.watch(lambda why: [heard.append(why), told.set()])
        decoder.step(step_of((PROMPT, 0, TABLE)))
        pid = decoder.others.pids[1]
        os.kill(pid, signal.SIGKILL)
        assert told.wait(10)
        assert heard == [f"rank 2 (process {pid}) was ended by signal 9 while the worker ran"]
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(RankLost, match=rf"rank 2 \(process {pid}\) was ended by signal 9"):
                decoder.step(step_of((PROMPT, 0, TABLE)))
        assert time.monotonic() - began < 15


def test_a_rank_that_stands_still_fails_the_step_after_the_time_that_was_set(tmp_path: Path) -> None:
    with ranked(write_tiny_gguf(tmp_path / "model.gguf"), rank_timeout_s=3.0) as decoder:
        decoder.step(step_of((PROMPT, 0, TABLE)))
        (pid,) = decoder.others.pids
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(RankLost, match=rf"in 3 s.*stuck: rank 1 \(process {pid}\)"):
                decoder.step(step_of((PROMPT, 0, TABLE)))
        finally:
            os.kill(pid, signal.SIGCONT)


def test_a_rank_that_does_not_come_up_ends_the_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (pytest.raises(ValueError, match=r"rank 1 \(process \d+\) ended with exit code 1 before it was ready"),
          ranked(write_tiny_gguf(tmp_path / "model.gguf"))):
        pass


def test_settings_that_ranks_do_not_go_with_are_refused(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "model.gguf")
    for more, sentence in (({"tensor_parallel": 3}, "cannot share 4 query heads on 2 KV heads.*1 or 2 or 4"),
                           ({"kv_tier_mib": 8}, "no tier"), ({"engine": "mock"}, "nothing to share"),
                           ({"tensor_parallel": 0}, "1 or more")):
        with pytest.raises(ValueError, match=sentence), ranked(model, **more):
            pass
