"""A decoder that replays recordings makes the steps of one that launches them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.checkpoint import open_checkpoint
from kernels.decoder import TorchDecoder
from kernels.replay import FRESH, ROWS, ReplayingDecoder, Size, size_of
from kernels.step import Logprobs, StepInputs
from tests.kernels.families import FAMILIES
from tests.kernels.recording import CpuRecorder
from tests.kernels.static_ops import STATIC
from tests.kernels.steps import Paged, generate, lay_out, mixed_sampling, step_inputs
from tests.kernels.tiny import Tiny, write_tiny_folder

BLOCKS = 64
SEQUENCES = 16


def pair(folder: Path, shape: Tiny | None = None) -> tuple[TorchDecoder, ReplayingDecoder, CpuRecorder]:
    """A decoder that launches, and one that replays."""
    checkpoint = open_checkpoint(write_tiny_folder(folder / "model", shape))
    recorder = CpuRecorder()
    replaying = ReplayingDecoder(checkpoint, blocks=BLOCKS, ops=STATIC, recorder=recorder, most_rows=256,
                                 most_sequences=SEQUENCES)
    return TorchDecoder(checkpoint, blocks=BLOCKS), replaying, recorder


def prompts(decoder: TorchDecoder, count: int, new_tokens: int) -> list[Paged]:
    random = np.random.default_rng(4)
    parts = lay_out([random.integers(0, 256, 5 + 9 * number).tolist() for number in range(count)], new_tokens, decoder)
    for number, part in enumerate(parts):
        part.temperature, part.seed = number % 2 * 0.8, number
    return parts


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "nemotron"])
def test_streams_are_those_of_launches_and_each_size_is_recorded_once_when_it_is_needed(
    tmp_path: Path, family: str
) -> None:
    plain, replaying, recorder = pair(tmp_path, FAMILIES[family])
    assert recorder.recorded == 0
    expected, found = prompts(plain, 3, 20), prompts(replaying, 3, 20)
    generate(plain, expected, 20)
    generate(replaying, found, 20)
    assert [part.chosen for part in found] == [part.chosen for part in expected]
    sizes = {size_of(rows, longest, plain.context_length) for rows, longest in ((5, 5), (14, 14), (23, 23), (3, 43))}
    assert set(replaying.recordings) == sizes
    assert recorder.recorded == len(sizes)
    assert recorder.replayed == 3 + 19


def test_a_size_is_the_next_one_and_too_many_rows_have_none() -> None:
    assert size_of(3, 17, 4096) == Size(4, 512)
    assert size_of(128, 513, 4096) == Size(128, 1024)
    assert size_of(1, 4000, 4001) == Size(1, 4001)
    assert size_of(ROWS[-1] + 1, 17, 4096) is None


def test_padded_rows_write_nothing(tmp_path: Path) -> None:
    _, replaying, _ = pair(tmp_path)
    for cache in (replaying.keys, replaying.values):
        cache.fill_(7.0)
    (part,) = lay_out([list(range(11))], 1, replaying)
    replaying.step(step_inputs([(part, 11)]))
    for cache in (replaying.keys, replaying.values):
        written = (cache != 7.0).any(-1).any(-1).any(0)  # [blocks, block size]
        assert written.sum() == 11
        assert written[part.blocks[0], :11].all()


def test_a_step_may_begin_before_the_tokens_of_the_last_one_are_known(tmp_path: Path) -> None:
    plain, replaying, _ = pair(tmp_path)
    expected, found = prompts(plain, 3, 12), prompts(replaying, 3, 12)
    generate(plain, expected, 12)
    generate(replaying, found, 1)
    steps = []
    for ahead in range(11):
        inputs = step_inputs([(part, 1) for part in found])
        carried = np.full(3, FRESH, np.int32)
        if ahead:
            inputs.tokens[:] = 0  # nobody knows them yet
            carried = np.array([2, 1, 0], np.int32)[::-1].copy()
        steps.append(replaying.submit(inputs, carried))
        if ahead:
            for part, token in zip(found, replaying.collect(steps[ahead - 1]).tolist(), strict=True):
                part.chosen.append(token)
        for part in found:
            part.done += 1
            part.tokens.append(0)
    for part, token in zip(found, replaying.collect(steps[-1]).tolist(), strict=True):
        part.chosen.append(token)
    assert [part.chosen for part in found] == [part.chosen for part in expected]


def test_a_row_may_carry_from_any_sample_in_a_step_that_is_launched_too(tmp_path: Path) -> None:
    plain, replaying, _ = pair(tmp_path)
    first, second = (lay_out([[1, 2, 3], [4, 5, 6]], 3, decoder) for decoder in (plain, replaying))
    chosen = plain.step(step_inputs([(part, 3) for part in first])).tolist()
    replaying.collect(replaying.submit(step_inputs([(part, 3) for part in second])))
    for parts in (first, second):
        for part in parts:
            part.done += 3
    for part, token in zip(first, chosen, strict=True):
        part.tokens.append(token)
    for part in second:
        part.tokens.append(0)
    # sequence 1 alone: its token is sample 1 of the step before
    masked = step_inputs([(first[1], 1)]), step_inputs([(second[1], 1)])
    for inputs in masked:
        inputs.temperature[0], inputs.top_k[0] = 0.9, 5
    expected = plain.step(masked[0]).tolist()
    assert replaying.collect(replaying.submit(masked[1], np.array([1], np.int32))).tolist() == expected


def test_masks_and_logprobs_run_launch_by_launch_to_the_same_choices(tmp_path: Path) -> None:
    plain, replaying, recorder = pair(tmp_path)

    def asked() -> StepInputs:
        inputs = mixed_sampling(5)
        inputs.logprobs = Logprobs.asked([0, 7], [-1, 3], 4)
        return inputs

    expected, found = asked(), asked()
    assert replaying.step(found).tolist() == plain.step(expected).tolist()
    assert recorder.recorded == 0
    assert found.logprobs is not None
    assert expected.logprobs is not None
    assert found.logprobs.top_ids.tolist() == expected.logprobs.top_ids.tolist()


def test_block_tables_are_copied_only_when_they_are_others(tmp_path: Path) -> None:
    _, replaying, _ = pair(tmp_path)
    (part,) = lay_out([[3, 1, 4]], 8, replaying)
    generate(replaying, [part], 1)
    copies = replaying._fixed.table_copies
    tables = None
    for _ in range(5):
        inputs = step_inputs([(part, 1)])
        tables = inputs.block_tables if tables is None else tables
        inputs.block_tables = tables
        part.tokens.append(int(replaying.step(inputs)[0]))
        part.done += 1
    assert replaying._fixed.table_copies == copies + 1


def test_at_most_two_steps_are_under_way_and_a_malformed_one_is_none(tmp_path: Path) -> None:
    _, replaying, _ = pair(tmp_path)
    parts = lay_out([[1, 2], [3]], 1, replaying)
    inputs = step_inputs([(parts[0], 2), (parts[1], 1)])
    bad = step_inputs([(parts[0], 2)])
    bad.tokens[0] = 256
    first = replaying.submit(inputs)
    with pytest.raises(ValueError, match="token id lies outside"):
        replaying.submit(bad)
    second = replaying.submit(inputs)
    with pytest.raises(RuntimeError, match="2 steps are under way"):
        replaying.submit(inputs)
    assert replaying.collect(first).tolist() == replaying.collect(second).tolist()
    too_many = step_inputs([(part, 1) for part in lay_out([[1]] * (SEQUENCES + 1), 0, replaying)])
    with pytest.raises(ValueError, match=f"256 rows in {SEQUENCES} sequences"):
        replaying.submit(too_many)


def test_what_would_wait_for_the_host_cannot_be_recorded() -> None:
    numbers = torch.arange(4)
    for run in (lambda: numbers.nonzero(), lambda: numbers.sum().item(), lambda: torch.tensor([1, 2]) + numbers[:2]):
        with pytest.raises(RuntimeError, match="cannot be recorded"):
            CpuRecorder().record(run)


def test_a_replay_reads_memory_and_not_what_python_says_by_now() -> None:
    memory, out, factor = torch.ones(3), torch.zeros(3), [2.0]

    def run() -> None:
        out.copy_(memory * factor[0] + 1)

    replay = CpuRecorder().record(run)
    memory.fill_(5.0)
    factor[0] = 100.0
    replay()
    assert out.tolist() == [11.0] * 3
