"""Messages about streams, for drafter tests."""

from typing import Any

from shared.messages import Close, Commit, Follow, Open
from shared.tokens import pack


def opened(tokens: list[int], stream: str = "s", **fields: Any) -> Open:
    values: dict[str, Any] = {"attempt": 1, "tokens": pack(tokens), "prompt_tokens": len(tokens)}
    return Open(stream, **(values | fields))


def commit(base_length: int, tokens: list[int], stream: str = "s", attempt: int = 1) -> Commit:
    return Commit(stream, attempt, base_length, pack(tokens))


def closed(stream: str = "s", attempt: int = 1) -> Close:
    return Close(stream, attempt)


class Teller:
    """A worker's side of Follow: counts its messages."""

    def __init__(self, worker: str = "w0", epoch: int = 1) -> None:
        self.worker = worker
        self.epoch = epoch
        self.seq = 0

    def tell(self, *events: Open | Commit | Close) -> Follow:
        self.seq += 1
        return Follow(self.worker, self.epoch, self.seq, events)
