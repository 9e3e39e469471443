"""What a client wrote, as the tokens the mesh works on; and back, one choice at a time.

Rule: text stays here (law 3): whoever holds a `Prompt` needs no tokenizer.
No clock and no bus. Long prompts take milliseconds: the caller may use a thread, everything here allows it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from gateway.detokenize import Detokenizer
from gateway.dialects import thinking
from gateway.dialects.dialect import Dialect, Reading, dialect_of
from gateway.dialects.showing import with_tools
from gateway.model_files import ModelCard, load_card
from gateway.openai.parameters import Options
from gateway.replies import Choice, ReadChoice
from gateway.stops import StopMatcher
from gateway.template import ChatTemplate
from gateway.tokenizer import Tokenizer
from gateway.tools import Tools
from shared.adjust import LONGEST_BAD_WORD
from shared.blocks import hash_chain, join_hashes
from shared.errors import BadRequest, ContextTooLong
from shared.messages import Adjust
from shared.tokens import pack, unpack

_MARK_TOKENS = 16  # a mark has fewer, and white space behind it


class Prompt(Struct, frozen=True):
    """One prompt as messages carry it."""

    tokens: list[int]
    packed: bytes
    block_hashes: bytes
    max_tokens: int  # for the answer


class ServedModel:
    """The model of a gateway: its name in the mesh, its tokenizer and template."""

    def __init__(self, name: str, card: ModelCard, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.name = name
        self.card = card
        self.tokenizer = tokenizer
        self.template = template
        self.dialect: Dialect = dialect_of(template.source, card.special_tokens)

    @classmethod
    def load(cls, folder: str | Path, name: str) -> "ServedModel":
        """The model pulled into `folder`. Raises UnusableModel."""
        card = load_card(folder)
        return cls(name, card, Tokenizer.load(folder), ChatTemplate.of(card))

    def chat(self, messages: list[dict[str, Any]], *, now_s: float, add_generation_prompt: bool = True,
             continue_final_message: bool = False, variables: dict[str, Any] | None = None,
             tools: Tools | None = None) -> list[int]:
        """The tokens of a conversation; `now_s` unix seconds. Raises BadRequest, also without a template."""
        shown = [] if tools is None else [tool.shown() for tool in tools.offered]
        if self.dialect.shows and (shown or any("tool_calls" in message or message.get("role") == "tool"
                                                for message in messages)):
            try:
                messages, shown = with_tools(self.template.read(messages), shown), []
            except RecursionError:
                raise BadRequest("tools and their calls are nested too deeply: send flatter ones",
                                 param="tools") from None
        text = self.template.render(messages, now_s=now_s, tools=shown, add_generation_prompt=add_generation_prompt,
                                    continue_final_message=continue_final_message, variables=variables)
        return self.tokenizer.encode(text, add_special=False)

    def opens_thought(self, tokens: Sequence[int]) -> bool:
        """Whether a prompt ends with the mark that opens a thought."""
        if self.dialect.thoughts != "think":
            return False
        return self.tokenizer.decode(tokens[-_MARK_TOKENS:]).rstrip().endswith(thinking.OPENING)

    def text(self, text: str, add_special: bool = True) -> list[int]:
        """The tokens of plain text."""
        return self.tokenizer.encode(text, add_special=add_special)

    def prompt(self, tokens: list[int], max_tokens: int | None, default_max_tokens: int, salt: bytes,
               param: str = "prompt") -> Prompt:
        """Tokens made ready to travel; `param` is the field they came in.

        `max_tokens` None: the default, or what is left of the context; 0: no answer is wanted. Raises BadRequest for
        ids the model does not have and ContextTooLong when prompt and answer do not fit.
        """
        context = self.card.context_length
        if not tokens:
            raise BadRequest("the prompt is empty: send at least one token", param=param)
        if max(tokens) >= self.card.vocabulary_size or min(tokens) < 0:
            raise BadRequest(f"prompt holds a token id outside 0..{self.card.vocabulary_size - 1}", param=param)
        if max_tokens == 0 and len(tokens) > context:
            raise ContextTooLong(f"this model's maximum context length is {context} tokens, and one text of {param} "
                                 f"has {len(tokens)}: shorten it, or cut it in several", param=param)
        if max_tokens != 0 and len(tokens) + (max_tokens or 1) > context:
            raise ContextTooLong(f"this model's maximum context length is {context} tokens: the prompt has "
                                 f"{len(tokens)} and {max_tokens or 'at least 1'} more were asked for; shorten the "
                                 "prompt or ask for fewer", param=param)
        left = context - len(tokens)
        return Prompt(tokens, pack(tokens), join_hashes(hash_chain(tokens, salt)),
                      min(default_max_tokens, left) if max_tokens is None else max_tokens)

    def end_tokens(self, options: Options) -> tuple[int, ...]:
        """The ids that end a stream."""
        own: Sequence[int] = () if options.ignore_eos else self.card.stop_token_ids
        return tuple(dict.fromkeys((*own, *options.stop_token_ids)))

    def adjust(self, options: Options) -> Adjust | None:
        """What shifts or masks logits, with the bad words as tokens; slow, for a thread. Raises BadRequest."""
        size = self.card.vocabulary_size
        adjust = options.adjust or Adjust()
        for param, ids in (("logit_bias", unpack(adjust.biased)), ("allowed_token_ids", unpack(adjust.allowed)),
                           ("stop_token_ids", options.stop_token_ids)):
            if ids and max(ids) >= size:
                raise BadRequest(f"{param} names token id {max(ids)}: this model has ids 0..{size - 1}", param=param)
        if options.bad_words:
            adjust = replace(adjust, bad_words=self._bad_words(options.bad_words))
        return None if adjust == Adjust() else adjust

    def _bad_words(self, words: Sequence[str]) -> tuple[bytes, ...]:
        """Each word as it stands, and as it stands behind a space."""
        spellings = [spelling for word in words for spelling in (word, " " + word.lstrip())]
        found = tuple(dict.fromkeys(pack(self.text(spelling, add_special=False)) for spelling in spellings))
        if max(map(len, found)) > 4 * LONGEST_BAD_WORD:
            raise BadRequest(f"bad_words takes strings of at most {LONGEST_BAD_WORD} tokens: name shorter ones",
                             param="bad_words")
        return found

    def choice(self, options: Options, reading: Reading | None = None) -> Choice:
        """The text side of one stream; without `reading` all of it is text."""
        stops = StopMatcher(options.stop, options.include_stop) if options.stop else None
        min_tokens = options.adjust.min_tokens if options.adjust is not None else 0
        reader = None if reading is None else self.dialect.reader(reading.callable, reading.opened)
        if reading is None or reader is None:
            return Choice(Detokenizer(self.tokenizer, options.skip_special), stops, self.end_tokens(options),
                          min_tokens)
        shown = [self.card.special_tokens[mark] for mark in self.dialect.marks if mark in self.card.special_tokens]
        return ReadChoice(reader, Detokenizer(self.tokenizer, options.skip_special, shown), stops,
                          self.end_tokens(options), min_tokens, one_call=reading.one_call,
                          shows_thoughts=reading.shows_thoughts)
