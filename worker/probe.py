"""The worker's answer to the parity probe, by the code that names its cached blocks.

Rule: no shortcut through `shared.blocks.hash_chain`: what is compared is what serves. Pure.
"""

from shared.messages import Generate
from shared.parity import probe_salt, probe_tokens
from shared.tokens import pack
from worker.sequence import from_request


def probe_answer(worker: str, epoch: int, block_size_tokens: int) -> bytes:
    """The name this worker would give the last full block of the probe; empty when no block is full."""
    tokens = probe_tokens(worker, epoch)
    full = len(tokens) // block_size_tokens
    if not full:
        return b""
    request = Generate("probe", 1, "", "", pack(tokens), 1, 0.0, cache_salt=probe_salt(worker, epoch))
    sequence = from_request(request, 0, 0.0, 0.0, len(tokens) + 1)
    return sequence.name(full - 1, block_size_tokens)
