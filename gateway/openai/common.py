"""What all OpenAI-shaped bodies share: decoding, errors, usage.

Rules: `null` means absent; fields we do not know are ignored; a body that cannot be read names the field.
Pure.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from gateway.dialects.parts import Argued, Called, Part, Said, Thought
from gateway.openai.logprobs import Told
from shared.errors import BadRequest, MillError
from shared.pricing import shown

T = TypeVar("T")

_encoder = msgspec.json.Encoder()
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


class PromptTokensDetails(Struct):
    cached_tokens: int = 0


class CompletionTokensDetails(Struct):
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0  # of the caller's predicted outputs, never of our drafters
    rejected_prediction_tokens: int = 0


class MillUsage(Struct):
    """What the mesh did for this request; `worker` is the one that ended the (first) stream."""

    worker: str = ""
    drafter: str = ""
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    attempts: int = 1


class Usage(Struct):
    """Tokens of one request, counted as sampled, never as chunks."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    mill: MillUsage | UnsetType = UNSET
    cost: msgspec.Raw | UnsetType = UNSET  # dollars, exact, where asked for


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0, mill: MillUsage | None = None,
          accepted_prediction_tokens: int = 0, rejected_prediction_tokens: int = 0, reasoning_tokens: int = 0,
          cost: int | None = None) -> Usage:
    """The usage block for these counts; `cost` in nano-dollars."""
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens,
                 PromptTokensDetails(max(0, min(cached_tokens, prompt_tokens))),
                 CompletionTokensDetails(reasoning_tokens, accepted_prediction_tokens, rejected_prediction_tokens),
                 mill or UNSET, UNSET if cost is None else msgspec.Raw(shown(cost).encode()))


UsageNow = Callable[[], Usage]  # the counts so far


class Echo(NamedTuple):
    """A prompt that stands before its answer; `told`: how likely its tokens were, where asked for."""

    text: str
    told: list[Told] | None


class WholeCall(NamedTuple):
    """A call of a tool. Arguments that were cut off are as they are."""

    name: str
    arguments: str


class Spoken(NamedTuple):
    """An answer, by what it is made of."""

    text: str
    thoughts: str
    calls: list[WholeCall]


def spoken(parts: Iterable[Part]) -> Spoken:
    """Text, thoughts and calls of `parts`."""
    said: list[str] = []
    thoughts: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for part in parts:
        match part:
            case Said(text):
                said.append(text)
            case Thought(text):
                thoughts.append(text)
            case Called(name):
                calls.append((name, []))
            case Argued(text):
                calls[-1][1].append(text)
    return Spoken("".join(said), "".join(thoughts), [WholeCall(name, "".join(texts)) for name, texts in calls])


def call_id(number: str, choice: int, call: int, length: int | None = None) -> str:
    """A call's id: of one answer's choices each call has another. `length`: exactly so many letters and digits."""
    digest = blake2b(f"{number}-{choice}-{call}".encode(), digest_size=16).hexdigest()
    return f"call_{digest[:24]}" if length is None else digest[:length]


class WholeChoice(NamedTuple):
    """One choice of an answer in one piece; None for what the client did not ask for."""

    parts: Sequence[Part]
    reason: str
    tokens: list[int] | None = None
    prompt: list[int] | None = None
    told: list[Told] | None = None
    prompt_told: list[Told] | None = None
    echo: Echo | None = None
    stopped: str | None = None  # the stop string that ended it
    embedding: bytes = b""  # of its prompt, where that was asked for

    @property
    def text(self) -> str:
        """What it said, without thoughts and calls."""
        return "".join(part.text for part in self.parts if isinstance(part, Said))


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that name a field, or one within it, by the name that `names` has for it."""
    try:
        yield
    except BadRequest as error:
        for name, known in names.items():
            if error.param == name or (error.param or "").startswith((f"{name}.", f"{name}[")):
                raise type(error)(re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", known, error.message),
                                  param=known + (error.param or "")[len(name):]) from None
        raise


class ErrorBody(Struct):
    message: str
    type: str
    param: str | None
    code: str


def error_json(error: MillError) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`, as openai clients read it."""
    return encode({"error": ErrorBody(error.message, error.type, error.param, error.code)})


def encode(body: Any) -> bytes:
    """One JSON document."""
    return _encoder.encode(body)


class WithText:
    """A JSON document of which only one text ever differs: the rest is encoded once."""

    def __init__(self, document: bytes, name: str) -> None:
        """`document` has an empty text under `name`."""
        # a string cannot hold these bytes: its quotes are escaped
        before, found, self._after = document.partition(b'"%b":""' % name.encode())
        self._before = before + found[:-2]

    def __call__(self, text: str) -> bytes:
        return self._before + _encoder.encode(text) + self._after


class BodyDecoder:
    """Turns request bodies into structs of one kind, or into a BadRequest that says what to mend."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.json.Decoder(kind)

    def __call__(self, raw: bytes) -> Any:
        try:
            return self._decoder.decode(raw)
        except msgspec.ValidationError as error:
            found = _PATH.search(str(error))
            param = found["path"] if found else None
            reason = str(error)[:found.start()] if found else str(error)
            if missing := re.search(r"missing required field `(\w+)`", reason):
                param = f"{param}.{missing[1]}" if param else missing[1]
                raise BadRequest(f"{param} is missing", param=param) from None
            raise BadRequest(f"{param or 'body'}: {reason}", param=param) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"the body is not readable JSON: {error}") from None
