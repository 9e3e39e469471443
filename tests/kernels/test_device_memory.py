"""The KV cache gets what a measured step leaves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kernels.checkpoint import open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.device_memory import MOST_LIKELY, blocks_that_fit, worst_step
from tests.kernels.tiny import Tiny, write_tiny_folder


class Counted:
    """A device of 1,000 bytes whose memory the test keeps count of."""

    def __init__(self, used: int) -> None:
        self.now = used
        self.highest = used

    def total(self) -> int:
        return 1000

    def used(self) -> int:
        return self.now

    def take(self, count: int) -> None:
        self.now += count
        self.highest = max(self.highest, self.now)

    def peak_of(self, run: Callable[[], None]) -> int:
        before = self.highest = self.now
        run()
        return self.highest - before


def test_blocks_fill_what_weights_and_the_worst_step_leave_of_the_share() -> None:
    device = Counted(used=300)

    def step() -> None:
        device.take(150)
        device.take(100)
        device.take(-250)

    assert blocks_that_fit(device, 0.9, 20, step) == (900 - 300 - 250) // 20
    assert device.used() == 300


def test_what_stays_of_the_worst_step_is_counted_once() -> None:
    device = Counted(used=300)
    assert blocks_that_fit(device, 0.9, 20, lambda: [device.take(250), device.take(-150)]) == (900 - 300 - 250) // 20
    assert device.used() == 400


def test_no_room_for_a_block_says_what_takes_it() -> None:
    device = Counted(used=700)
    with pytest.raises(ValueError, match=r"no room for a KV block in 90% of it.*--tensor-parallel"):
        blocks_that_fit(device, 0.9, 20, lambda: [device.take(195), device.take(-195)])
    with pytest.raises(ValueError, match="more than 0 and at most 1"):
        blocks_that_fit(device, 1.5, 20, lambda: None)


@pytest.mark.parametrize("rows,sequences", [(256, 64), (40, 64), (7, 3)])
def test_the_worst_step_is_one_that_a_decoder_takes_with_one_block(tmp_path: Path, rows: int, sequences: int) -> None:
    shape = Tiny(context_length=100)
    decoder = TorchDecoder(open_checkpoint(write_tiny_folder(tmp_path / "model", shape)), blocks=1)
    # most of the block is never written: what lies there by chance may be no number
    for cache in (decoder.keys, decoder.values):
        cache.zero_()
    inputs = worst_step(
        rows, sequences, decoder.context_length, decoder.block_size_tokens, decoder.vocabulary_size
    )
    assert len(inputs.tokens) == rows
    assert len(inputs.sequence_starts) - 1 == min(rows, sequences)
    assert (inputs.positions[inputs.sequence_starts[1:] - 1] == 99).all()
    assert inputs.sample_rows.tolist() == list(range(rows))
    for name in ("temperature", "top_k", "top_p", "min_p", "seeds"):
        values = getattr(inputs, name)
        assert values.shape == (rows,), name
        assert name == "seeds" or (values != {"top_p": 1}.get(name, 0)).all(), name
    assert inputs.adjustments is not None
    assert inputs.adjustments.samples.tolist() == inputs.adjustments.mask_of.tolist() == list(range(rows))
    assert inputs.adjustments.masks.shape == (rows, decoder.vocabulary_size // 32)
    assert len(decoder.step(inputs)) == rows
    assert inputs.logprobs is not None
    assert inputs.logprobs.top_ids.shape == (rows, MOST_LIKELY)
    assert np.isfinite(inputs.logprobs.of_target).all()
