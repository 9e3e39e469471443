"""Which tokens a grammar permits next: JSON schemas, regular expressions, choices, Lark or EBNF, by llguidance.

Rules: what is permitted follows from grammar, vocabulary and the answer so far, so it is the same on every worker and a
state can be had again from the tokens alone. Text that the grammar leaves no choice about is spelt in the longest
tokens there are. A grammar is compiled once for each tenant, in a thread; each stream has a copy, and all copies share
the states of one lexer. What grows beyond the limits below breaks its own stream, and the next begins with a lexer of
its own.

    begin(grammar, answer) -> GrammarState --advance(token)--> ... finished
                                   |-- admitted(drafts), forced()      what of a draft it permits, what it demands
                                   `-- fill(masks, drafts)             rows of masks, while a step is under way
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from decimal import Decimal
from json import dumps
from math import isfinite
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.errors import BadRequest, NoEligibleWorker, WorkerFailed
from shared.messages import Grammar
from shared.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

Masks = NDArray[np.uint32]

# with the states below, at 1 to 2 kB each, a tenant's grammars take 300 MB at the worst and all of them 2.5 GB; those
# of ordinary schemas take less than a megabyte each
REMEMBERED_GRAMMARS, REMEMBERED_OF_ONE = 64, 8
# no schema of `deploy.bench.schemas` meets them. 26 expressions like `/[a-z]*a[a-z]{12}/` in one took 0.7 s of
# everybody's step under the library's own limits before they broke, and take 0.05 s under these
STEP_FUEL, STEP_ITEMS, ROW_ITEMS, LEXER_STATES = 20_000, 20_000, 2_000, 20_000
INITIAL_FUEL = 200_000
# what a schema may ask at most: compiling takes 0.1 s for a multiple of 10,007, 6 s for one of 99,991 and minutes for
# one of ten million; 1 s for 4,000 properties
MOST_MULTIPLE, MOST_NAMES = 10_000, 5_000
# keywords of a schema under which stand names that the answer is to hold, each with its schema
NAMED = ("properties",)
# between two marks of JSON; without a bound a small model may write nothing else any more
WHITESPACE = r"[ \n\t]{0,32}"
LONGEST_SPELLING = 32
_SHOWN = 300  # characters of an error


class GrammarState:
    """One stream's place in its grammar."""

    def __init__(self, compiled: "Compiled", end_ids: Sequence[int]) -> None:
        self.end_ids = frozenset(end_ids)
        self.finished = False  # nothing may follow but the end
        self._compiled = compiled
        self._matcher = compiled.matcher.deep_copy()

    @property
    def broken(self) -> str:
        """Why the grammar cannot be kept to any more: it grew beyond the limits. Empty while it can."""
        if not self._matcher.is_error():
            return ""
        # the lexer is shared: who begins now would break too
        self._compiled.spoilt = True
        # the library's own words quote tokens of the answer
        return "the grammar is too complex for what came of it: send a simpler one"

    def resume(self, answer: Sequence[int]) -> bool:
        """Take all of an earlier answer. False when the grammar does not permit it, or is broken."""
        for token in answer:
            if self.finished:
                if token not in self.end_ids:
                    return False
            elif not self._matcher.try_consume_tokens([token]):
                if self._permits(token):
                    # it cannot be taken all the same: let the library say why
                    self._matcher.consume_token(token)
                return False
            self.finished = self._matcher.is_stopped()
        return not self.broken

    def advance(self, token: int) -> bool:
        """Take a token of the answer. False when the grammar does not permit it, or is broken."""
        if self.finished:
            return token in self.end_ids
        permitted = bool(self._matcher.consume_token(token))
        self.finished = self._matcher.is_stopped()
        return permitted

    def admitted(self, drafts: Sequence[int]) -> int:
        """How many of these tokens the grammar permits, one after the other; none from the first that ends it."""
        if self.finished:
            return 0
        permitted: int = self._matcher.validate_tokens(list(drafts))
        return next((place for place in range(permitted) if drafts[place] in self.end_ids), permitted)

    def forced(self, most: int) -> list[int]:
        """Up to `most` tokens that are the only ones permitted, one after the other. May be empty."""
        if self.finished or most < 1:
            return []
        forced: list[int] = self._matcher.compute_ff_tokens()[:most]
        return forced[:self.admitted(forced)] if forced else []

    def fill(self, masks: Masks, drafts: Sequence[int]) -> None:
        """What may follow: `masks` [1 + len(drafts), W] of the first row, and behind each admitted draft."""
        taken = 0
        for row in range(len(drafts) + 1):
            if row and not self._matcher.is_stopped():
                taken += bool(self._matcher.consume_token(drafts[row - 1]))
            self._matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks[row].nbytes)
        if taken and not self.broken:
            self._matcher.rollback(taken)

    def _permits(self, token: int) -> bool:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        return token // 32 < len(mask) and bool(mask[token // 32] >> np.uint32(token % 32) & 1)


class Compiled:
    """A grammar of one tenant, and whether its lexer has reached a limit."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self.matcher = matcher
        self.spoilt = False


class Grammars:
    """The grammars of one vocabulary. Safe to use from several threads; none waits for what another compiles."""

    def __init__(self, load: Callable[[], Vocabulary | None], vocabulary_size: int) -> None:
        """`load` is called by `prepare`, or when the first grammar comes."""
        self.compilations = 0
        self._load = load
        self._size = vocabulary_size
        self._lock = threading.Lock()  # of what is known; held for moments
        self._preparing = threading.Lock()
        self._words: _Words | None = None
        self._tokenizer: LLTokenizer | None = None
        self._end_ids: list[int] = []
        self._known: OrderedDict[tuple[bytes, Grammar], Compiled | BadRequest] = OrderedDict()

    @property
    def ready(self) -> bool:
        """Whether there is a vocabulary that grammars can use, as far as `prepare` has found."""
        return self._tokenizer is not None

    def prepare(self) -> None:
        """Make the vocabulary ready. Holds the interpreter for 0.2 s to 1.5 s, so it belongs before a worker's work.

        Raises NoEligibleWorker where there is no vocabulary that grammars can use.
        """
        from llguidance import LLTokenizer

        with self._preparing:
            if self._tokenizer is not None:
                return
            vocabulary = self._load()
            if vocabulary is None:
                raise NoEligibleWorker("grammars need the vocabulary beside the model, which this worker does not "
                                       "have: run `tokenmill pull` again", param="grammar")
            self._end_ids = [id for id in vocabulary.end_ids if id < self._size]
            if not self._end_ids:
                raise NoEligibleWorker("grammars need a token that ends an answer, and this model names none",
                                       param="grammar")
            self._words = _Words(vocabulary, self._size, self._end_ids[0])
            self._tokenizer = LLTokenizer(self._words, n_vocab=self._size, eos_token=self._end_ids)

    def begin(self, grammar: Grammar, answer: Sequence[int], owner: bytes = b"") -> GrammarState:
        """The state behind the tokens of `answer`. Milliseconds, or as long as compiling takes; for a thread.

        `owner`: a tenant's cache salt; whether another has sent the same grammar does not show in the time it takes.
        Raises BadRequest for a grammar that cannot be used or does not permit `answer`, NoEligibleWorker where there
        is no vocabulary, WorkerFailed where the grammar breaks on the way.
        """
        self.prepare()
        state = GrammarState(self._compiled(grammar, owner), self._end_ids)
        if state.resume(answer):
            return state
        if state.broken:
            # other streams have filled the lexer that they share; this one has a right to one of its own
            state = GrammarState(self._compiled(grammar, owner), self._end_ids)
            if state.resume(answer):
                return state
        if state.broken:
            raise WorkerFailed(state.broken, param="grammar")
        raise BadRequest("the grammar does not permit what was generated so far", param="grammar")

    def knows(self, grammar: Grammar, owner: bytes) -> bool:
        """Whether nothing has to be compiled for this tenant to begin."""
        with self._lock:
            known = self._known.get((owner, grammar))
        return isinstance(known, BadRequest) or (known is not None and not known.spoilt)

    def refuse(self, grammar: Grammar, owner: bytes, error: BadRequest) -> None:
        """Remember that this tenant's grammar cannot be used."""
        with self._lock:
            self._remember((owner, grammar), error)

    def _compiled(self, grammar: Grammar, owner: bytes) -> Compiled:
        key = owner, grammar
        with self._lock:
            known = self._known.get(key)
            if known is not None:
                self._known.move_to_end(key)
        if isinstance(known, BadRequest):
            raise known.with_traceback(None)
        if known is not None and not known.spoilt:
            return known
        try:
            compiled = Compiled(self._compile(grammar))
        except BadRequest as error:
            self.refuse(grammar, owner, error)
            raise
        with self._lock:
            # the refusal of one that took too long stays
            if not isinstance(self._known.get(key), BadRequest):
                self._remember(key, compiled)
        return compiled

    def _remember(self, key: tuple[bytes, Grammar], value: Compiled | BadRequest) -> None:
        self._known[key] = value
        self._known.move_to_end(key)
        own = [other for other in self._known if other[0] == key[0]]
        if len(own) > REMEMBERED_OF_ONE:
            del self._known[own[0]]
        if len(self._known) > REMEMBERED_GRAMMARS:
            self._known.popitem(last=False)

    def _compile(self, grammar: Grammar) -> "LLMatcher":
        from llguidance import LLMatcher

        assert self._words is not None and self._tokenizer is not None
        self.compilations += 1
        _check(grammar, self._words)
        matcher = LLMatcher(self._tokenizer, _source(grammar), log_level=0, limits=_limits())
        if matcher.is_error():
            raise BadRequest(f"the {grammar.kind} grammar cannot be used: {matcher.get_error()[:_SHOWN]}",
                             param="grammar")
        return matcher


class _Words:
    """A vocabulary as llguidance reads it, and its one way to spell forced text: the longest token first."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, size: int, end_id: int) -> None:
        special = set(vocabulary.special_ids)
        self.tokens = (vocabulary.tokens + [b""] * size)[:size]
        self.special_token_ids = sorted(id for id in special if id < size)
        self.eos_token_id = end_id
        self._ids = {word: id for id, word in reversed(list(enumerate(self.tokens))) if word and id not in special}

    def __call__(self, text: bytes | str) -> list[int]:
        left = text.encode() if isinstance(text, str) else text
        spelt = []
        while left:
            length = min(len(left), LONGEST_SPELLING)
            while length > 1 and left[:length] not in self._ids:
                length -= 1
            id = self._ids.get(left[:length])
            if id is None:
                # a byte without a token; the library asks for no more than a beginning
                break
            spelt.append(id)
            left = left[length:]
        return spelt

    def can_spell(self, text: str) -> bool:
        """Whether there are tokens for all of it."""
        return all(bytes([byte]) in self._ids for byte in set(text.encode())) or b"".join(
            self.tokens[id] for id in self(text)) == text.encode()


def _limits() -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(max_items_in_row=ROW_ITEMS, initial_lexer_fuel=INITIAL_FUEL, step_lexer_fuel=STEP_FUEL,
                          step_max_items=STEP_ITEMS, max_lexer_states=LEXER_STATES, verbose_errors=False)


def _check(grammar: Grammar, words: _Words) -> None:
    """Refuse what would be compiled for minutes, or could not be spelt. Raises BadRequest."""
    if grammar.kind not in ("json", "choice"):
        return
    try:
        read = msgspec.json.decode(grammar.text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadRequest(f"the {grammar.kind} grammar cannot be read: {str(error)[:_SHOWN]}", param="grammar") from None
    if grammar.kind == "choice":
        if isinstance(read, list) and len(read) > MOST_NAMES:
            raise BadRequest(f"a choice takes at most {MOST_NAMES} strings, got {len(read)}", param="grammar")
        for choice in read if isinstance(read, list) else ():
            if isinstance(choice, str) and not words.can_spell(choice):
                raise BadRequest(f"no tokens of this model spell the choice {choice[:40]!r}", param="grammar")
        return
    names = 0
    left: list[tuple[object, bool]] = [(read, False)]  # and whether its keys are names, not keywords
    while left:
        part, named = left.pop()
        if isinstance(part, list):
            names += len(part)
            left += [(each, False) for each in part]
        elif isinstance(part, dict):
            names += len(part)
            left += [(value, key in NAMED and not named) for key, value in part.items()]
            if _multiple(part.get("multipleOf")) > MOST_MULTIPLE:
                raise BadRequest(f"multipleOf must have a value of at most {MOST_MULTIPLE} (its digits, where it is a "
                                 f"fraction), got {str(part['multipleOf'])[:40]}", param="grammar")
            texts = list(part) if named else _texts([part.get("const"), part.get("enum")])
            # as JSON has it: control characters are escaped
            if (text := next((text for text in texts if not words.can_spell(dumps(text, ensure_ascii=False))),
                             None)) is not None:
                raise BadRequest(f"no tokens of this model spell {text[:40]!r}, which the schema names",
                                 param="grammar")
    if names > MOST_NAMES:
        raise BadRequest(f"a schema takes at most {MOST_NAMES} keywords, properties and values of an enum, got {names}",
                         param="grammar")


def _texts(value: object) -> list[str]:
    """All that is written in a constant."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [text for each in value.items() for text in _texts(list(each))] if isinstance(value, dict) else []


def _multiple(value: object) -> int:
    """How many remainders there are to tell apart; 0 of what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return 0
    _, digits, exponent = Decimal(str(value)).normalize().as_tuple()
    # no more than counts for too much
    zeros = min(exponent, 10) if isinstance(exponent, int) and exponent > 0 else 0
    return int("".join(map(str, digits)) + "0" * zeros)


def _source(grammar: Grammar) -> str:
    """The grammar as llguidance takes it. Raises BadRequest."""
    from llguidance import LLMatcher, grammar_from

    try:
        match grammar.kind:
            case "json":
                # a default: a schema may say otherwise under x-guidance
                spaced = LLMatcher.grammar_from_json_schema(grammar.text, defaults={"whitespace_pattern": WHITESPACE})
                return str(spaced)
            case "choice":
                choices = msgspec.json.decode(grammar.text, type=list[str])
                if not choices:
                    raise ValueError("it names no choice")
                return str(LLMatcher.grammar_from_lark("start: " + " | ".join(map(dumps, choices))))
            case "regex":
                return str(LLMatcher.grammar_from_regex(grammar.text))
            case "lark":
                return str(grammar_from("grammar", grammar.text))
    except ValueError as error:
        raise BadRequest(f"the {grammar.kind} grammar cannot be read: {str(error)[:_SHOWN]}", param="grammar") from None
