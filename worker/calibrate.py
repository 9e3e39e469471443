"""What steps of several sizes cost, measured before the first request comes.

Rules: each size once, and again for about a second at most; of each size the quickest step counts, since a pause of a
busy machine is no cost, and a router that took it for one would turn the first requests away. Speculation and routers
then start from measurements instead of a guess, and what a decoder does once (paging weights in, choosing kernels) is
done before anyone waits for it.
"""

import numpy as np

from kernels.step import StepInputs
from shared.clock import Clock
from worker.runner import Runner
from worker.step_cost import StepCost

# those that lines are drawn through; the others show where rows come in blocks
DECODE_ROWS = (1, 8, 32)
TABLE_ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFILL_TOKENS = 128
REPEATS = 3
ENOUGH_S = 1.0


async def calibrate(runner: Runner, cost: StepCost, clock: Clock, max_running: int, step_tokens: int) -> None:
    """Run steps with many rows and with few and let `cost` observe them. Raises what the decoder raises."""
    decoder = runner.decoder
    rows, table = (sorted({min(count, max_running, decoder.blocks) for count in counts})
                   for counts in (DECODE_ROWS, TABLE_ROWS))
    prefill = min(PREFILL_TOKENS, step_tokens, decoder.blocks * decoder.block_size_tokens, decoder.context_length)
    sizes = [(1, count) for count in table] + [(prefill, 1)]
    # the first does what is done once
    await runner.execute(_inputs(1, 1, decoder.block_size_tokens))
    begin = clock.now()
    least_s: dict[tuple[int, int], float] = {}
    for length, sequences in sizes * REPEATS:
        started = clock.now()
        await runner.execute(_inputs(length, sequences, decoder.block_size_tokens))
        ended = clock.now()
        least_s[length, sequences] = min(least_s.get((length, sequences), ended - started), ended - started)
        if ended - begin > ENOUGH_S and len(least_s) == len(sizes):
            break
    for (length, sequences), seconds in [*least_s.items()] * REPEATS:
        if length > 1 or sequences in rows:
            cost.observe(sequences, (length - 1) * sequences, seconds)
    for count in table:
        cost.table.measure(count, least_s[1, count])


def _inputs(length: int, sequences: int, block_size: int) -> StepInputs:
    """So many sequences of `length` tokens from position 0, the last of each sampled."""
    blocks = -(-length // block_size)
    return StepInputs(
        tokens=np.zeros(length * sequences, np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), sequences),
        sequence_starts=np.arange(0, length * sequences + 1, length, dtype=np.int32),
        block_tables=np.arange(blocks * sequences, dtype=np.int32).reshape(sequences, blocks),
        sample_rows=np.arange(length - 1, length * sequences, length, dtype=np.int32),
        temperature=np.zeros(sequences, np.float32), top_k=np.zeros(sequences, np.int32),
        top_p=np.ones(sequences, np.float32), min_p=np.zeros(sequences, np.float32),
        seeds=np.zeros(sequences, np.uint64))
