"""Which tokens a grammar permits next: JSON schemas, regular expressions, choices, Lark or EBNF, by llguidance.

Rules: what is permitted follows from grammar, vocabulary and the answer so far, so it is the same on every worker and a
state can be had again from the tokens alone. Text that the grammar leaves no choice about is spelt in the longest
tokens there are. A grammar is compiled once for each tenant, in a thread; each stream has a copy. The library is
imported with the first one, which takes 0.1 s.

    begin(grammar, answer) -> GrammarState --advance(token)--> ... finished
                                   |-- admitted(drafts), forced()      what of a draft it permits, what it demands
                                   `-- fill(masks, drafts)             rows of masks, while a step is under way
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from json import dumps
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.errors import BadRequest
from shared.messages import Grammar
from shared.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Masks = NDArray[np.uint32]

REMEMBERED_GRAMMARS = 64
# between two marks of JSON; without a bound a small model may write nothing else any more
WHITESPACE = r"[ \n\t]{0,32}"
LONGEST_SPELLING = 32
_SHOWN = 300  # characters of an error


class GrammarState:
    """One stream's place in its grammar."""

    def __init__(self, matcher: "LLMatcher", end_ids: Sequence[int]) -> None:
        self.end_ids = frozenset(end_ids)
        self.finished = False  # nothing may follow but the end
        self._matcher = matcher

    @property
    def broken(self) -> str:
        """Why the grammar cannot be kept to any more: it grew beyond what its library bears. Empty while it can."""
        return f"the grammar is too complex: {self._matcher.get_error()[:_SHOWN]}" if self._matcher.is_error() else ""

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
        if taken:
            self._matcher.rollback(taken)


class Grammars:
    """The grammars of one vocabulary. Safe to use from several threads."""

    def __init__(self, load: Callable[[], Vocabulary | None], vocabulary_size: int) -> None:
        """`load` is called when the first grammar comes."""
        self._load = load
        self._size = vocabulary_size
        self._lock = threading.Lock()
        self._words: LLTokenizer | None = None
        self._end_ids: list[int] = []
        self._compiled: OrderedDict[tuple[bytes, Grammar], LLMatcher] = OrderedDict()

    def begin(self, grammar: Grammar, answer: Sequence[int], owner: bytes = b"") -> GrammarState:
        """The state behind the tokens of `answer`. Milliseconds, or a second for the first; for a thread.

        `owner`: a tenant's cache salt; whether another has sent the same grammar does not show in the time it takes.
        Raises BadRequest for a grammar that cannot be used, or does not permit `answer`.
        """
        with self._lock:
            state = GrammarState(self._matcher(grammar, owner).deep_copy(), self._end_ids)
        if not all(state.advance(token) for token in answer):
            raise BadRequest("the grammar does not permit what was generated so far", param="grammar")
        return state

    def _matcher(self, grammar: Grammar, owner: bytes) -> "LLMatcher":
        from llguidance import LLMatcher

        if (known := self._compiled.get((owner, grammar))) is not None:
            self._compiled.move_to_end((owner, grammar))
            return known
        if self._words is None:
            self._words = self._tokenizer()
        matcher = LLMatcher(self._words, _source(grammar), log_level=0)
        if matcher.is_error():
            raise BadRequest(f"the {grammar.kind} grammar cannot be used: {matcher.get_error()[:_SHOWN]}",
                             param="grammar")
        self._compiled[owner, grammar] = matcher
        if len(self._compiled) > REMEMBERED_GRAMMARS:
            self._compiled.popitem(last=False)
        return matcher

    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        vocabulary = self._load()
        if vocabulary is None:
            raise BadRequest("grammars need the vocabulary beside the model, which this worker does not have: "
                             "run `tokenmill pull` again", param="grammar")
        self._end_ids = [id for id in vocabulary.end_ids if id < self._size]
        if not self._end_ids:
            raise BadRequest("grammars need a token that ends an answer, and this model names none", param="grammar")
        return LLTokenizer(_Words(vocabulary, self._size, self._end_ids[0]), n_vocab=self._size,
                           eos_token=self._end_ids)


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
            spelt.append(self._ids[left[:length]])
            left = left[length:]
        return spelt


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
