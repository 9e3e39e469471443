"""Write data/tokenizer_golden.json: what the original SmolLM2 tokenizer makes of `odd_strings`. Run by hand.

    python -m venv hf && hf/bin/pip install "torch==2.13.*" && hf/bin/pip install transformers gguf tokenizers regex
    PYTHONPATH=. hf/bin/python tests/gateway/make_tokenizer_golden.py path/to/SmolLM2-135M-Instruct.gguf

Two witnesses that share no code with ours must agree on every string before anything is written:
- transformers, reading the same GGUF. Its conversion (5.23) gives every gpt2-type vocabulary GPT-2's own pre-tokeniser
  and so forgets that SmolLM2 takes digits one by one. The original tokenizer.json says Sequence[Digits(individual),
  ByteLevel], so that is put back; how many strings the difference touches is printed and kept in the file.
- a plain byte-pair encoder, below, over the `regex` package.
"""

import hashlib
import json
import sys
from itertools import pairwise
from pathlib import Path

import regex
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from tests.gateway.odd_strings import odd_strings

SEED, COUNT, SAMPLES = 2026, 8000, 150
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


class PlainEncoder:
    """Specials first, then digits, then words, then merges by rank. Slow and obvious."""

    def __init__(self, path: str) -> None:
        fields = GGUFReader(path).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        types = fields["tokenizer.ggml.token_type"].contents()
        self.ids = {token: i for i, token in enumerate(tokens)}
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        specials = sorted((t for t, kind in zip(tokens, types, strict=True) if kind == 3), key=len, reverse=True)
        self.special = regex.compile("(" + "|".join(map(regex.escape, specials)) + ")")
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        self.character = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}

    def encode(self, text: str) -> list[int]:
        found = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:
                found.append(self.ids[part])
                continue
            for piece in regex.split(r"(\p{N})", part):
                for word in WORD.findall(piece):
                    found += self._merge([self.character[byte] for byte in word.encode()])
        return found

    def _merge(self, symbols: list[str]) -> list[int]:
        while len(symbols) > 1:
            pairs = [(self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(symbols))]
            rank, i = min(pairs)
            if rank == 1 << 30:
                break
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        # a few bytes have no token in this vocabulary and no "unknown" stands in for them
        return [self.ids[symbol] for symbol in symbols if symbol in self.ids]


def main(path: Path) -> None:
    strings = odd_strings(SEED, COUNT)
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).backend_tokenizer
    converted = [theirs.encode(s, add_special_tokens=False).ids for s in strings]
    print("unknown token of transformers' conversion:", theirs.model.unk_token)
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    encoded = [theirs.encode(s, add_special_tokens=False).ids for s in strings]
    plain = PlainEncoder(str(path))
    disagreed = [(s, ids, plain.encode(s)) for s, ids in zip(strings, encoded, strict=True) if ids != plain.encode(s)]
    for s, ids, other in disagreed[:10]:
        print(ascii(s), ids, other)
    touched = sum(a != b for a, b in zip(converted, encoded, strict=True))
    print(f"{len(strings)} strings, {sum(map(len, encoded))} tokens, {len(disagreed)} disagreements of the witnesses")
    print(f"{touched} strings differ under the pre-tokeniser that transformers' GGUF conversion chooses")
    if disagreed:
        sys.exit("nothing written")
    golden = {
        "seed": SEED,
        "count": COUNT,
        "strings_sha256": hashlib.sha256("\0".join(strings).encode()).hexdigest(),
        "ids_sha256": [hashlib.sha256(repr(ids).encode()).hexdigest()[:8] for ids in encoded],
        "differ_in_transformers_gguf_conversion": touched,
        "samples": [[s, ids] for s, ids in zip(strings, encoded, strict=True) if len(ids) < 40][:SAMPLES],
    }
    target = Path(__file__).parent / "data" / "tokenizer_golden.json"
    target.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
