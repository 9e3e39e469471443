"""Strings that break tokenizers, the same on every machine: only `Random.random` is used, which Python keeps stable."""

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")

WORDS = (
    "the", "of", "Hello", "don't", "WE'LL", "I'm", "it's",
    "naïve", "Straße", "ﬁne", "İstanbul", "ｗｉｄｅ", "token", "ization",
    "supercalifragilistic", "http://example.org/a?b=c&d=%20", "user@example.org", "C++",
    "x86_64", "3.14159", "1e-9", "0xFF",
    "１２３", "٣٤٥", "½", "Ⅷ", "²", "日本語", "你好，世界", "한국어",
    "ไทย", "हिन्दी", "עברית", "العربية", "Ελληνικά", "Русский",
)  # fmt: skip
CODE = (
    "def f(x):\n    return x ** 2\n",
    "for (int i = 0; i < n; ++i) {\n\t\tsum += a[i];\n}", "SELECT * FROM t WHERE a='b';",
    '{"key": [1, 2.5, null, true], "other": "\\u00e9\\n"}', "<div class=\"a\">&nbsp;</div>", "#!/bin/sh\nset -e\n\n\n",
    "\\begin{equation} \\alpha_i^2 \\end{equation}",
    "fn main() -> Result<(), Box<dyn Error>> { Ok(()) }", "a\r\nb\r\n\r\nc\r",
)  # fmt: skip
EMOJI = (
    "😀", "👩‍👩‍👧‍👦", "👨🏽‍🚀", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️", "☺︎", "1️⃣", "🧑‍🤝‍🧑", "🫠", "👍🏿", "\U0001f9d1\u200d",
)  # fmt: skip
LOOK_ALIKES = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start",
    "|im_end|>", "<|IM_END|>", "< |im_end|>", "<||im_end|>",
    "<|im_end|><|im_end|>", "<|im_start|>user\n", "<file_sep>",
    "<filename>a", "<repo_name", "<empty_output>", "<gh_stars>1",
    "<s>", "</s>", "[INST]", "<0x0A>", "▁", "Ġ", "Ċ", "ĠĠ", "<|im_<|im_end|>end|>",
)  # fmt: skip
COMBINING = "\u0301\u0308\u0323\u20dd\u0489\u094d\u0e49\u0651\u200d\ufe0f\u200b\ufeff"
# Blocks whose characters have had their properties for many Unicode versions: what a string means must not change.
BLOCKS = (
    (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x400), (0x400, 0x500), (0x5D0, 0x5EB), (0x620, 0x65F), (0x905, 0x940),
    (0xE01, 0xE3B), (0x1100, 0x1200), (0x1E00, 0x1F00), (0x2000, 0x2070), (0x2070, 0x208F), (0x2100, 0x2184),
    (0x2190, 0x2400), (0x2460, 0x2500), (0x2500, 0x2700), (0x3000, 0x3100), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4),
    (0xE000, 0xE100), (0xFB00, 0xFB07), (0xFF01, 0xFF5F), (0x10000, 0x1000C), (0x10330, 0x1034B), (0x1D400, 0x1D455),
    (0x1D7CE, 0x1D800), (0x1F300, 0x1F600), (0x20000, 0x2A6D7), (0xE0100, 0xE01F0), (0xF0000, 0xF0100),
    (0x10FF00, 0x10FFFE),
)  # fmt: skip
SPACES = " \n\t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"


def odd_strings(seed: int, count: int) -> list[str]:
    """`count` strings, the empty one first; none holds half of a surrogate pair."""
    random = Random(seed)
    return ["", *(_string(random) for _ in range(count - 1))]


def _string(random: Random) -> str:
    return "".join(_pick(random, _PARTS)(random) for _ in range(_below(random, 6) + 1))


def _below(random: Random, n: int) -> int:
    return int(random.random() * n)


def _pick(random: Random, items: Sequence[T]) -> T:
    return items[_below(random, len(items))]


def _characters(random: Random) -> str:
    low, high = _pick(random, BLOCKS)
    return "".join(chr(low + _below(random, high - low)) for _ in range(_below(random, 12) + 1))


def _mixed(random: Random) -> str:
    return "".join(_characters(random)[0] for _ in range(_below(random, 12) + 1))


def _words(random: Random) -> str:
    return _pick(random, (" ", "  ", "", "\n", ", ")).join(_pick(random, WORDS) for _ in range(_below(random, 8) + 1))


def _run(random: Random) -> str:
    unit = _pick(random, (" ", "\n", "\t", "0", "7", "a", "-", "=", "😀", "\r\n", " \n", "."))
    return unit * (_below(random, 70) + 1)


def _spaces(random: Random) -> str:
    spaces = "".join(_pick(random, SPACES) for _ in range(_below(random, 6) + 1))
    return spaces + _pick(random, ("", "x", "1", "'s", "é"))


def _digits(random: Random) -> str:
    return " " * _below(random, 4) + "".join(_pick(random, "0123456789") for _ in range(_below(random, 30) + 1))


def _controls(random: Random) -> str:
    return "".join(chr(_below(random, 32)) for _ in range(_below(random, 5) + 1)) + "\x7f"


def _accents(random: Random) -> str:
    return "".join(_pick(random, "aeionшקक가") + _pick(random, COMBINING) for _ in range(_below(random, 6) + 1))


def _one_of(items: Sequence[str]) -> Callable[[Random], str]:
    return lambda random: _pick(random, items)


_PARTS: tuple[Callable[[Random], str], ...] = (
    _characters, _mixed, _words, _words, _run, _spaces, _digits, _controls, _accents,
    _one_of(CODE), _one_of(EMOJI), _one_of(LOOK_ALIKES), _one_of(LOOK_ALIKES),
)  # fmt: skip
