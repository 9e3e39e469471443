"""What an endpoint makes of an answer: the documents of a stream, or one document with all of it.

`gateway.answer` knows when something has come; a `Reply` knows how its API says that.
Pure.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gateway import sse
from gateway.dialects.parts import Part
from gateway.openai.common import Echo, Usage, UsageNow, WholeChoice, error_json
from gateway.openai.logprobs import NO_SPELLING, Spelling, Told
from gateway.speculation import RequestMetrics
from shared.errors import MillError


class Head(NamedTuple):
    """What all documents of an answer share."""

    number: str  # of the answer: letters and digits, behind a prefix of the API's
    created: int  # unix seconds
    model: str
    fingerprint: str
    include_usage: bool = False  # of a stream
    tier: str | None = None  # where the client asked for one
    spelling: Spelling = NO_SPELLING  # where it asked how likely tokens were
    id_length: int | None = None  # of a call's id, where the model's template counts its characters


class Reply(ABC):
    """Builds the documents of one answer. Choices are told apart by their index."""

    id: str
    quick = True  # `content` says all there is to say of text alone

    def opening(self, index: int, prompt: list[int] | None, echo: Echo | None = None,
                usage: UsageNow | None = None) -> list[bytes]:
        """What comes before all else of a choice; `prompt`: its ids, where the client asked for them."""
        return []

    def content(self, index: int, text: str) -> bytes:
        """A piece of text of which nothing else is told."""
        raise NotImplementedError

    @abstractmethod
    def piece(self, index: int, parts: Sequence[Part], tokens: list[int] | None = None, usage: Usage | None = None,
              told: list[Told] | None = None) -> list[bytes]:
        """What was added. `tokens`, `usage` and `told` (how likely they were) where the client asked for them."""

    @abstractmethod
    def closing(self, index: int, reason: str, usage: Usage | None, stopped: str | None = None) -> list[bytes]:
        """The end of a choice: stop, length or tool_calls; `stopped`: the stop string that ended it."""

    @abstractmethod
    def totals(self, usage: Usage, metrics: RequestMetrics | None = None) -> list[bytes]:
        """What comes after all choices have ended."""

    @abstractmethod
    def whole(self, choices: list[WholeChoice], usage: Usage, metrics: RequestMetrics | None = None) -> bytes:
        """The answer in one piece."""

    def failed(self, error: MillError) -> bytes:
        """The last document of a stream that broke."""
        return error_json(error)

    def events(self, documents: Iterable[bytes]) -> bytes:
        """Documents as they are written."""
        return sse.events(documents)

    done = sse.DONE  # behind the last
