"""Answers as gpt-oss writes them: messages, each with a channel and perhaps somebody it is for.

    <|channel|>analysis<|message|>a thought<|end|><|start|>assistant
    <|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>
    <|channel|>final<|message|>text<|return|>

analysis is a thought; commentary for nobody and final are text; an object for a function on offer is a call.
The marks that end an answer are stop tokens and show no text. Source: OpenAI's harmony format.
Pure.
"""

import re
from collections.abc import Collection

from gateway.dialects.call_object import Arguments
from gateway.dialects.parts import Part, Reader, Said, Thought, could_begin, first_of

CHANNEL, MESSAGE, START, END, CONSTRAIN = "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>"
CALL, RETURN = "<|call|>", "<|return|>"
_ENDS = (END, CALL, RETURN, START)
_CHANNEL = re.compile(r"<\|channel\|>\s*([a-z]+)")
_FOR = re.compile(r"\bto=functions\.([A-Za-z0-9_.-]{1,128})")
_LONGEST_HEAD = 512


class HarmonyReader(Reader):
    """One answer, from behind the prompt's `<|start|>assistant` on."""

    def __init__(self, offered: Collection[str]) -> None:
        """`offered`: names of the tools that may be called; none where none are."""
        self._offered = offered
        self._buffer = ""
        self._ended = False
        self._place = "head"  # head, plain, body, call
        self._channel = ""
        self._called = ""  # the tool that the message is for
        self._call: Arguments | None = None

    @property
    def thinking(self) -> bool:  # type: ignore[override]
        return self._place == "plain" and self._channel == "analysis"

    def push(self, text: str) -> list[Part]:
        self._buffer += text
        parts: list[Part] = []
        while self._buffer and self._step(parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        self._ended = True
        return self.push("")

    def _step(self, parts: list[Part]) -> bool:
        """Get on by one piece. False when more has to come first."""
        match self._place:
            case "head":
                return self._head(parts)
            case "body":
                return self._body()
            case "call":
                return self._argue(parts)
            case _:
                return self._plain(parts)

    def _head(self, parts: list[Part]) -> bool:
        head = self._buffer[:_LONGEST_HEAD]
        end = head.find(MESSAGE)
        if end < 0 and self._ended and head.lstrip().startswith((CHANNEL, START)):
            self._buffer = ""  # cut off before its message
            return True
        if not _may_be_head(head) or (end < 0 and (self._ended or len(head) == _LONGEST_HEAD)):
            # no message of this format: all of it is text
            self._place, self._channel = "plain", ""
            return True
        if end < 0:
            return False
        head, self._buffer = head[:end], self._buffer[end + len(MESSAGE):]
        channel, receiver = _CHANNEL.search(head), _FOR.search(head)
        self._channel = channel[1] if channel else "final"
        self._called = receiver[1] if receiver and receiver[1] in self._offered else ""
        self._place = "body" if self._called else "plain"
        return True

    def _body(self) -> bool:
        """The beginning of a message for a tool: a call where it is an object."""
        body = self._buffer.lstrip()
        if not body:
            self._buffer = ""
        elif body[0] == "{":
            self._buffer, self._place, self._call = body, "call", Arguments(self._called)
        else:
            self._place, self._channel = "plain", ""
        return True

    def _argue(self, parts: list[Part]) -> bool:
        assert self._call is not None
        for place, character in enumerate(self._buffer):
            more = self._call.feed(character)
            if more is None:
                # behind the arguments, or where they broke off
                self._buffer = self._buffer[place:]
                self._place, self._channel = "plain", "none" if self._call.done else ""
                return True
            parts += more
        self._buffer = ""
        return True

    def _plain(self, parts: list[Part]) -> bool:
        found = first_of(self._buffer, _ENDS)
        held = could_begin(self._buffer, _ENDS) if found is None and not self._ended else 0
        text = self._buffer[:len(self._buffer) - held] if found is None else self._buffer[:found[0]]
        if text and self._channel != "none":
            parts.append(Thought(text) if self._channel == "analysis" else Said(text))
        self._buffer = self._buffer[len(text):]
        if found is None:
            return False
        self._buffer = self._buffer[len(found[1]):]
        self._place = "head"
        return True


def _may_be_head(text: str) -> bool:
    """Whether a message may begin with this: its author, whom it is for, its channel."""
    begins = text.lstrip()
    ways = (CHANNEL, START, MESSAGE, "assistant", "to=")
    return any(begins.startswith(way) or way.startswith(begins) for way in ways)
