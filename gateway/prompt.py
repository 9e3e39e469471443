"""What a client wrote, as the tokens the mesh works on; and back, one choice at a time.

Rule: text stays here (law 3): whoever holds a `Prompt` needs no tokenizer.
No clock and no bus. Long prompts take milliseconds: the caller may use a thread, everything here allows it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from gateway.detokenize import Detokenizer
from gateway.model_files import ModelCard, load_card
from gateway.openai.parameters import Options
from gateway.replies import Choice
from gateway.stops import StopMatcher
from gateway.template import ChatTemplate
from gateway.tokenizer import Tokenizer
from shared.blocks import hash_chain, join_hashes
from shared.errors import BadRequest, ContextTooLong
from shared.tokens import pack


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

    @classmethod
    def load(cls, folder: str | Path, name: str) -> "ServedModel":
        """The model pulled into `folder`. Raises UnusableModel."""
        card = load_card(folder)
        return cls(name, card, Tokenizer.load(folder), ChatTemplate.of(card))

    def chat(self, messages: list[dict[str, Any]], *, now_s: float, add_generation_prompt: bool = True,
             continue_final_message: bool = False, variables: dict[str, Any] | None = None) -> list[int]:
        """The tokens of a conversation; `now_s` unix seconds. Raises BadRequest, also without a template."""
        text = self.template.render(messages, now_s=now_s, add_generation_prompt=add_generation_prompt,
                                    continue_final_message=continue_final_message, variables=variables)
        return self.tokenizer.encode(text, add_special=False)

    def text(self, text: str, add_special: bool = True) -> list[int]:
        """The tokens of plain text."""
        return self.tokenizer.encode(text, add_special=add_special)

    def prompt(self, tokens: list[int], max_tokens: int | None, default_max_tokens: int, salt: bytes,
               param: str = "prompt") -> Prompt:
        """Tokens made ready to travel; `param` is the field they came in.

        `max_tokens` None: the default, or what is left of the context. Raises BadRequest for ids the model does not
        have and ContextTooLong when prompt and answer do not fit.
        """
        context = self.card.context_length
        if not tokens:
            raise BadRequest("the prompt is empty: send at least one token", param=param)
        if max(tokens) >= self.card.vocabulary_size or min(tokens) < 0:
            raise BadRequest(f"prompt holds a token id outside 0..{self.card.vocabulary_size - 1}", param=param)
        if len(tokens) >= context or len(tokens) + (max_tokens or 1) > context:
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

    def choice(self, options: Options) -> Choice:
        """The text side of one stream."""
        stops = StopMatcher(options.stop, options.include_stop) if options.stop else None
        return Choice(Detokenizer(self.tokenizer, options.skip_special), stops, self.end_tokens(options))
