"""Requests, workers and blocks for router tests."""

from collections.abc import Iterable
from typing import Any

from router.prefix_index import NAME_BYTES
from shared.blocks import BLOCK_SIZE_TOKENS, hash_chain, join_hashes
from shared.messages import Generate, WorkerStatus
from shared.tokens import pack

SALT = b"salt"


def blocks(count: int, start: int = 0) -> list[bytes]:
    """A chain of hashes; chains of one `start` share their beginning."""
    return hash_chain(range(start, start + count * BLOCK_SIZE_TOKENS), SALT)


def named(hashes: Iterable[bytes]) -> set[bytes]:
    """Blocks as an index names them."""
    return {block[:NAME_BYTES] for block in hashes}


def request(prompt_tokens: int = 160, start: int = 0, **fields: Any) -> Generate:
    """A request for model `m`; prompts of one `start` share their beginning."""
    tokens = range(start, start + prompt_tokens)
    values: dict[str, Any] = {
        "request_id": f"r{start}", "attempt": 1, "gateway": "g", "model": "m", "tokens": pack(tokens),
        "max_tokens": 100, "deadline": 1e12, "block_hashes": join_hashes(hash_chain(tokens, SALT)),
    }
    return Generate(**(values | fields))


def status(name: str = "w0", **fields: Any) -> WorkerStatus:
    """A ready, idle, measured worker of model `m`."""
    values: dict[str, Any] = {
        "epoch": 1, "model": "m", "max_running": 8, "prefill_tok_s": 1000.0, "step_base_s": 0.01,
        "step_row_s": 0.0001,
    }
    return WorkerStatus(id=name, **(values | fields))
