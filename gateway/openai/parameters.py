"""The parameters that chat and text completions share, and what they ask of the mesh.

Rules: checked once, here; a parameter that would change the answer and is not supported is refused by name, one that
only describes the request (user, metadata, store, ...) is accepted and ignored. Extensions carry vLLM's names.
Pure.
"""

from typing import Any, Literal

import msgspec
import numpy as np
from msgspec import Struct

from gateway.tools import Tools
from shared.errors import BadRequest
from shared.messages import Adjust, Grammar, Sampling
from shared.tiers import DEFAULT, TIERS, Tier
from shared.tokens import pack

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_PRIORITY = 100
MAX_BIASED = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARACTERS = 1024
MAX_STOP_IDS = 1024
MAX_LOGPROBS = 20
MAX_SCORES = 500_000  # some 50 MB of JSON
EMBEDDED_AT_ONCE = 64
MAX_GRAMMAR_CHARACTERS = 1 << 17
_AS_IT_IS, _NOTHING_ASKED = Adjust(), (None,) * 6
JSON_OBJECT = Grammar("json", '{"type":"object"}')


Texts = str | list[str | int | list[int]]  # or token ids, of one text or of several


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Struct):
    name: str = ""
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    type: str = "text"
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct):
    """As vLLM has it; one of them."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Parameters(Struct, kw_only=True):
    """Fields of both request bodies, as the client may send them."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    seed: int | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    # extensions
    top_k: int | None = None
    min_p: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: int | None = None  # as in vLLM, a smaller number goes first
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprobs: bool | int | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None  # as older versions of vLLM have them
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # known, not supported: refused unless they leave the answer as it is
    truncate_prompt_tokens: int | None = None


class Options(Struct, frozen=True):
    """The same, checked, with defaults in place. `max_tokens` None: as many as the gateway's default allows."""

    sampling: Sampling
    seed: int | None
    choices: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    include_stop: bool
    skip_special: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    priority: int  # as in the mesh, a larger number goes first
    cache_hint: str
    tier: Tier = DEFAULT
    show_tier: bool = False  # it was asked for, so the answer names it
    adjust: Adjust | None = None  # but for the bad words, which are text until a tokenizer has seen them
    bad_words: tuple[str, ...] = ()
    logprobs: int = -1  # how many of the likeliest tokens to show beside each; -1: none, and not its own
    prompt_logprobs: int = -1
    echo: bool = False  # the prompt stands before the answer
    prompt_only: bool = False  # there is no answer
    grammar: Grammar | None = None
    tools: Tools | None = None
    pooling: Literal["", "mean", "last"] = ""  # a vector for each prompt is wanted instead of an answer
    shows_thoughts: bool = True
    ignored: tuple[str, ...] = ()  # parameters that a client may think would do something

    def at_once(self, streams: int) -> int:
        """How many of so many streams there are at a time: all, but for vectors, which nobody waits for one by one."""
        return min(streams, EMBEDDED_AT_ONCE) if self.pooling else streams


def options(body: Parameters, max_tokens: int | None, max_tokens_name: str = "max_tokens") -> Options:
    """Check `body`. Raises BadRequest naming the first parameter that is wrong or not supported."""
    _refuse_unsupported(body)
    within("temperature", body.temperature, 0, 2)
    within("top_p", body.top_p, 0, 1)
    if body.top_p == 0:
        raise BadRequest("top_p must be above 0: for greedy decoding set temperature to 0", param="top_p")
    within("min_p", body.min_p, 0, 1)
    within("top_k", body.top_k, -1, 1 << 31)
    within("n", body.n, 1, MAX_CHOICES)
    within("seed", body.seed, -(1 << 63), (1 << 64) - 1)
    within("priority", body.priority, -MAX_PRIORITY, MAX_PRIORITY)
    if max_tokens is not None and max_tokens < 1:
        raise BadRequest(f"{max_tokens_name} must be 1 or more, got {max_tokens}", param=max_tokens_name)
    _check_min_tokens(body.min_tokens, max_tokens)
    adjust = _adjust(body)
    stream_options = body.stream_options or StreamOptions()
    return Options(
        sampling=Sampling(temperature=_or(body.temperature, 1.0), top_p=_or(body.top_p, 1.0),
                          top_k=max(0, body.top_k or 0), min_p=body.min_p or 0.0),
        seed=None if body.seed is None else body.seed % (1 << 64),
        choices=body.n or 1,
        max_tokens=max_tokens,
        stop=_stops(body.stop),
        stop_token_ids=_stop_ids(body.stop_token_ids),
        ignore_eos=bool(body.ignore_eos),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special=body.skip_special_tokens is not False,
        stream=bool(body.stream),
        include_usage=bool(stream_options.include_usage),
        continuous_usage=bool(stream_options.include_usage and stream_options.continuous_usage_stats),
        return_token_ids=bool(body.return_token_ids),
        priority=-(body.priority or 0),
        cache_hint=(body.prompt_cache_key or "")[:256],
        tier=_tier(body.service_tier),
        show_tier=body.service_tier is not None,
        adjust=None if adjust == _AS_IT_IS else adjust,
        bad_words=_bad_words(body.bad_words),
        prompt_logprobs=_prompt_logprobs(body),
        grammar=_grammar(body),
    )


def texts_or_ids(param: str, given: Texts | None) -> list[str] | list[list[int]]:
    """Texts, or the token ids of each. Raises BadRequest when there are none, or both kinds."""
    if given is None or given == []:
        raise BadRequest(f"{param} is missing: send a string, strings, token ids, or lists of token ids", param=param)
    if isinstance(given, str):
        return [given]
    texts = [item for item in given if isinstance(item, str)]
    ids = [item for item in given if isinstance(item, int)]
    lists = [item for item in given if isinstance(item, list)]
    if len(given) not in (len(texts), len(ids), len(lists)):
        raise BadRequest(f"{param} mixes strings and token ids: send one kind", param=param)
    return texts or lists or [ids]


def prompt_likeliest(options: Options) -> int:
    """How many of the likeliest tokens are to be told at each place of the prompt; -1: nothing."""
    return max(options.prompt_logprobs, options.logprobs if options.echo else -1)


def check_scored(options: Options, prompt_tokens: int) -> None:
    """Raise BadRequest where more would be told of prompts, of so many tokens together, than an answer can hold."""
    entries = prompt_tokens * (prompt_likeliest(options) + 1) * options.choices
    if entries > MAX_SCORES:
        raise BadRequest(f"{prompt_tokens} prompt tokens, times choices, times the likeliest of each make {entries} "
                         f"entries, and {MAX_SCORES} is the most: ask for fewer choices or fewer logprobs",
                         param="prompt_logprobs")


def refuse(param: str, instead: str = "leave it out") -> BadRequest:
    """The error for a parameter that would change the answer and is not supported."""
    return BadRequest(f"{param} is not supported: {instead}", param=param)


def _refuse_unsupported(body: Parameters) -> None:
    if body.truncate_prompt_tokens is not None:
        raise refuse("truncate_prompt_tokens")


def _grammar(body: Parameters) -> Grammar | None:
    """What the answer must be. Whether that can be compiled only a worker knows."""
    structured = body.structured_outputs or StructuredOutputs()
    found = _response_grammar(body.response_format) + [
        (param, grammar) for param, grammar in (
            ("structured_outputs.json", _json_grammar("structured_outputs.json", structured.json)),
            ("structured_outputs.regex", _text_grammar("regex", structured.regex)),
            ("structured_outputs.choice", _choice_grammar("structured_outputs.choice", structured.choice)),
            ("structured_outputs.grammar", _text_grammar("lark", structured.grammar)),
            ("structured_outputs.json_object", JSON_OBJECT if structured.json_object else None),
            ("guided_json", _json_grammar("guided_json", body.guided_json)),
            ("guided_regex", _text_grammar("regex", body.guided_regex)),
            ("guided_choice", _choice_grammar("guided_choice", body.guided_choice)),
            ("guided_grammar", _text_grammar("lark", body.guided_grammar))) if grammar is not None]
    if len(found) > 1:
        raise BadRequest(f"{' and '.join(param for param, _ in found)} exclude each other: send one of them",
                         param=found[1][0])
    if not found:
        return None
    param, grammar = found[0]
    check_length(grammar, param)
    return grammar


def check_length(grammar: Grammar, param: str) -> None:
    """Raise BadRequest for more than a worker should have to read."""
    if len(grammar.text) > MAX_GRAMMAR_CHARACTERS:
        raise BadRequest(f"{param} is longer than {MAX_GRAMMAR_CHARACTERS} characters: send a shorter one", param=param)


def _response_grammar(format: ResponseFormat | None) -> list[tuple[str, Grammar]]:
    if format is None or format.type == "text":
        return []
    if format.type == "json_object":
        return [("response_format", JSON_OBJECT)]
    if format.type != "json_schema":
        raise BadRequest("response_format.type must be text, json_object or json_schema", param="response_format.type")
    if format.json_schema is None or format.json_schema.schema is None:
        raise BadRequest("response_format.json_schema.schema is missing: send the schema the answer must fit",
                         param="response_format.json_schema.schema")
    return [("response_format", _schema_grammar("response_format.json_schema.schema", format.json_schema.schema))]


def _json_grammar(param: str, schema: dict[str, Any] | str | None) -> Grammar | None:
    """Of a schema, or of the text of one."""
    if schema is None:
        return None
    if not isinstance(schema, str):
        return _schema_grammar(param, schema)
    try:
        parsed = msgspec.json.decode(schema)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{param} is no readable JSON ({error}): send a schema, or its text", param=param) from None
    _schema_grammar(param, parsed)
    return Grammar("json", schema)


def _schema_grammar(param: str, schema: Any) -> Grammar:
    if not isinstance(schema, dict | bool):
        raise BadRequest(f"{param} is no JSON schema: send an object, true or false", param=param)
    try:
        return Grammar("json", _encode(schema))
    except RecursionError:
        raise BadRequest(f"{param} is nested too deeply: send a flatter schema", param=param) from None


def _text_grammar(kind: Literal["regex", "lark"], text: str | None) -> Grammar | None:
    return Grammar(kind, text) if text else None


def _choice_grammar(param: str, choices: list[str] | None) -> Grammar | None:
    if choices is None:
        return None
    if not all(choices) or not choices:
        raise BadRequest(f"{param} must name choices, none of them empty", param=param)
    return Grammar("choice", _encode(choices))


def _encode(value: Any) -> str:
    """As JSON."""
    return msgspec.json.encode(value).decode()


def _check_min_tokens(min_tokens: int | None, max_tokens: int | None) -> None:
    within("min_tokens", min_tokens, 0, 1 << 31)
    if min_tokens and max_tokens is not None and min_tokens > max_tokens:
        raise BadRequest(f"min_tokens ({min_tokens}) is above max_tokens ({max_tokens})", param="min_tokens")


def _adjust(body: Parameters) -> Adjust:
    """What shifts or masks logits; ids are still to be compared with a vocabulary."""
    asked = (body.presence_penalty, body.frequency_penalty, body.repetition_penalty, body.logit_bias, body.min_tokens,
             body.allowed_token_ids)
    if asked == _NOTHING_ASKED:
        return _AS_IT_IS
    within("presence_penalty", body.presence_penalty, -2, 2)
    within("frequency_penalty", body.frequency_penalty, -2, 2)
    within("repetition_penalty", body.repetition_penalty, 0.01, 100)
    bias = _bias(body.logit_bias or {})
    if body.allowed_token_ids == []:
        raise BadRequest("allowed_token_ids is empty, so no token could be chosen: name some, or leave it out",
                         param="allowed_token_ids")
    return Adjust(
        repetition_penalty=_or(body.repetition_penalty, 1.0), frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0, biased=pack(bias),
        biases=np.array([*bias.values()], "<f4").tobytes(), min_tokens=body.min_tokens or 0,
        allowed=pack(sorted({*_token_ids("allowed_token_ids", body.allowed_token_ids)})))


def _bias(bias: dict[str, float]) -> dict[int, float]:
    """By token id, ascending; what adds nothing left out."""
    if len(bias) > MAX_BIASED:
        raise BadRequest(f"logit_bias takes at most {MAX_BIASED} tokens, got {len(bias)}", param="logit_bias")
    for id, value in bias.items():
        if not (id.isascii() and id.isdecimal() and len(id) <= 10 and int(id) < 1 << 32):
            raise BadRequest(f"logit_bias has a key that is no token id: {id[:32]!r}", param="logit_bias")
        within(f"logit_bias[{id}]", value, -100, 100)
    return dict(sorted((int(id), value) for id, value in bias.items() if value))


def _bad_words(words: list[str] | None) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(words or ()))
    if len(found) > MAX_BAD_WORDS:
        raise BadRequest(f"bad_words takes at most {MAX_BAD_WORDS} strings, got {len(found)}", param="bad_words")
    if not all(word.strip() for word in found):
        raise BadRequest("bad_words must not hold an empty string", param="bad_words")
    if max(map(len, found), default=0) > MAX_BAD_WORD_CHARACTERS:
        raise BadRequest(f"bad_words takes strings of at most {MAX_BAD_WORD_CHARACTERS} characters", param="bad_words")
    return found


def _prompt_logprobs(body: Parameters) -> int:
    within("prompt_logprobs", body.prompt_logprobs, 0, MAX_LOGPROBS)
    if body.prompt_logprobs is not None and body.stream:
        raise refuse("prompt_logprobs with stream", "ask without stream")
    return -1 if body.prompt_logprobs is None else body.prompt_logprobs


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(found) > MAX_STOPS:
        raise BadRequest(f"stop takes at most {MAX_STOPS} strings, got {len(found)}", param="stop")
    if not all(found):
        raise BadRequest("stop must not hold an empty string", param="stop")
    return found


def _stop_ids(ids: list[int] | None) -> tuple[int, ...]:
    found = tuple(dict.fromkeys(_token_ids("stop_token_ids", ids)))
    if len(found) > MAX_STOP_IDS:
        raise BadRequest(f"stop_token_ids takes at most {MAX_STOP_IDS} ids, got {len(found)}", param="stop_token_ids")
    return found


def _token_ids(param: str, ids: list[int] | None) -> list[int]:
    if any(not 0 <= token < 1 << 32 for token in ids or ()):
        raise BadRequest(f"{param} must hold token ids of 0 or more", param=param)
    return ids or []


def names_tier(body: Parameters) -> bool:
    """Whether a tier is asked for; `auto` is what a request gets that does not ask."""
    return body.service_tier not in (None, "auto")


def _tier(name: str | None) -> Tier:
    if name in (None, "auto"):
        return DEFAULT
    for tier in TIERS:
        if name == tier:
            return tier
    raise BadRequest(f"service_tier must be one of auto, {', '.join(sorted(TIERS))}, got {(name or '')[:64]!r}",
                     param="service_tier")


def within(param: str, value: float | None, least: float, most: float) -> None:
    """Raise BadRequest for a value that lies elsewhere."""
    if value is not None and not least <= value <= most:
        raise BadRequest(f"{param} must lie between {least} and {most}, got {value}", param=param)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
