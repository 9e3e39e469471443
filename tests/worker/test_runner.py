"""Which engine runs, and on which thread."""

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.native.build import available
from kernels.step import StepInputs
from shared.clock import LoopClock
from shared.settings import WorkerSettings
from tests.kernels.tiny import write_tiny_gguf
from tests.worker.test_mock_decoder import inputs
from worker.mock_decoder import MockDecoder
from worker.runner import ThreadRunner, TimedRunner, engine_of, load_decoder, runner_for, vocabulary_of


class WatchedDecoder(MockDecoder):
    threads: set[int]

    def step(self, inputs: StepInputs) -> NDArray[np.int32]:
        self.threads.add(threading.get_ident())
        return super().step(inputs)


async def test_a_real_decoder_runs_on_one_thread_of_its_own() -> None:
    decoder = WatchedDecoder(blocks=4)
    decoder.threads = set()
    runner = ThreadRunner(decoder)
    try:
        expected = MockDecoder(blocks=4).step(inputs([70], [0])).tolist()
        for _ in range(5):
            assert await runner.execute(inputs([70], [0])) == expected
    finally:
        runner.close()
    assert len(decoder.threads) == 1
    assert threading.get_ident() not in decoder.threads


async def test_what_the_device_raises_arrives() -> None:
    runner = ThreadRunner(MockDecoder(blocks=4))
    try:
        with pytest.raises(ValueError, match="hole"):
            await runner.execute(inputs([70], [7]))
    finally:
        runner.close()


async def test_the_mock_runs_in_imagined_time() -> None:
    settings = WorkerSettings(engine="mock", kv_blocks=8, mock_vocabulary=500)
    decoder = load_decoder(settings)
    assert (decoder.blocks, decoder.vocabulary_size) == (8, 500)
    assert isinstance(runner_for(decoder, settings, LoopClock()), TimedRunner)


def test_the_vocabulary_is_read_from_the_card_beside_the_model(tmp_path: Path) -> None:
    weights = tmp_path / "model.gguf"
    assert vocabulary_of(WorkerSettings(engine="cpu", model=str(weights))) == ""
    (tmp_path / "card.json").write_text('{"name": "m", "vocabulary": "abc"}')
    for model in (weights, tmp_path):
        assert vocabulary_of(WorkerSettings(engine="cpu", model=str(model))) == "abc"
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(ValueError, match="no model card"):
        vocabulary_of(WorkerSettings(engine="cpu", model=str(weights)))


def test_an_unknown_engine_and_a_missing_model_are_named() -> None:
    with pytest.raises(ValueError, match="engine is 'gpu': choose one of auto, cpu"):
        engine_of(WorkerSettings(engine="gpu"))
    with pytest.raises(ValueError, match="engine cpu needs a model"):
        load_decoder(WorkerSettings(engine="cpu"))


def test_a_kv_format_is_taken_by_the_native_step_alone(tmp_path: Path) -> None:
    for engine in ("mock", "reference"):
        with pytest.raises(ValueError, match=f"engine {engine} has no KV format int8: leave out --kv-format"):
            load_decoder(WorkerSettings(engine=engine, kv_format="int8"))
    model = str(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="kv_format is 'int4': choose one of fp16, int8, fp8"):
        load_decoder(WorkerSettings(engine="cpu", model=model, kv_format="int4"))
    with pytest.raises(ValueError, match="only the native step has KV format int8"):
        load_decoder(WorkerSettings(engine="cpu", model=model, kv_format="int8"))


@pytest.mark.skipif(available() is not None, reason=str(available()))
def test_the_same_memory_holds_twice_the_blocks_in_a_smaller_kv_format(tmp_path: Path) -> None:
    model = str(write_tiny_gguf(tmp_path / "model.gguf"))
    found = {kind: load_decoder(WorkerSettings(engine="cpu", model=model, kv_mib=1, kv_format=kind))
             for kind in ("fp16", "fp8")}
    assert found["fp8"].blocks == 2 * found["fp16"].blocks
    assert found["fp8"].recipe == found["fp16"].recipe + "+kv-fp8"
