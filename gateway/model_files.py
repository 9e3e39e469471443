"""The files of a pulled model, and what is derived from them once.

A pulled model is a folder. Its weights are either `model.gguf` (or one other *.gguf) or Hugging Face files
(*.safetensors, config.json, tokenizer.json, tokenizer_config.json). `prepare` puts three small files beside them:

    tokenizer.json       the tokenizer as the `tokenizers` library reads it
    vocabulary.msgpack   a `shared.vocabulary.Vocabulary`: the bytes of each token, for workers that keep to a grammar
    card.json            a `ModelCard`: what the mesh has to know of the model without opening its weights

Reading a vocabulary out of GGUF takes seconds (2.8 s for 49,152 tokens), these take milliseconds; hence once.
All are written under another name and renamed, so that a reader finds them whole or not at all.
"""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from msgspec import Struct

from gateway.gguf_tokenizer import CONTROL, SPLITS, tokenizer_document
from gateway.token_bytes import token_bytes
from shared import vocabulary

FORMAT = 1  # of what `prepare` writes; a card of another format is written anew

# Tokens that end a turn, whatever the metadata calls them: many a conversion names only one.
END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|return|>",
    "<|call|>",
    "</s>",
)


class UnusableModel(ValueError):
    """These files cannot be served; the message says which and what would help."""


class ModelCard(Struct, frozen=True, kw_only=True):
    """What `card.json` holds. Token ids refer to `tokenizer.json` beside it."""

    format: int = FORMAT
    name: str  # as clients ask for it
    architecture: str  # llama, qwen2, ...
    context_length: int  # tokens, prompt and answer together
    vocabulary_size: int  # ids the model can produce; some may have no text
    vocabulary: str  # digest of the id -> token table: a drafter and a worker must agree on it
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # all that end a turn, `eos_token_id` among them
    add_bos: bool = False  # plain text is encoded behind a `bos` token
    special_tokens: dict[str, int] = {}  # shown to nobody
    chat_template: str = ""  # Jinja; empty: the model was not trained to chat
    source: str = ""  # digest of names, sizes and times of the files this was derived from


def prepare(source: Path, folder: Path) -> ModelCard:
    """Derive the three files in `folder` from a GGUF file or a folder of model files.

    Does nothing but read the card when all are there and still fit `source`. Raises UnusableModel.
    """
    weights = _find_gguf(source)
    files = [weights] if weights else _hub_files(source)
    identity = _identity(files)
    there = all((folder / name).is_file() for name in ("tokenizer.json", vocabulary.FILE))
    if there and (found := _existing_card(folder)) and found.source == identity:
        return found
    name = _name(files[0], folder)
    if weights:
        tokenizer, card = _from_gguf(weights, name, identity)
        _write(folder / "tokenizer.json", tokenizer)
    else:
        tokenizer, card = _from_hub(source, name, identity)
        if not _same_file(source / "tokenizer.json", folder / "tokenizer.json"):
            _write(folder / "tokenizer.json", tokenizer)
    _write(folder / vocabulary.FILE, vocabulary.encode_vocabulary(_vocabulary(_parse(tokenizer, name), card)))
    _write(folder / "card.json", msgspec.json.format(msgspec.json.encode(card), indent=1))
    return card


def load_card(folder: str | Path) -> ModelCard:
    """The card of a prepared model. Raises UnusableModel where there is none."""
    if card := _existing_card(Path(folder)):
        return card
    raise UnusableModel(f"{folder} has no card.json of this version: run `tokenmill pull {folder}`, use what it prints")


def load_tokenizer(folder: str | Path) -> tokenizers.Tokenizer:
    """The library's tokenizer of a prepared model. Raises UnusableModel."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UnusableModel(f"{folder} has no tokenizer.json: run `tokenmill pull {folder}`, use what it prints")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise UnusableModel(f"{path} cannot be read: {error}") from error


# --- which files, and have they changed ------------------------------------------------------------------------------


def _find_gguf(source: Path) -> Path | None:
    if source.is_file():
        if source.suffix != ".gguf":
            raise UnusableModel(f"{source.name} is no GGUF file: give a *.gguf or a folder of Hugging Face files")
        return source
    if not source.is_dir():
        raise UnusableModel(f"{source} does not exist")
    found = sorted(source.glob("*.gguf"))
    if source / "model.gguf" in found:
        return source / "model.gguf"
    if len(found) > 1:
        raise UnusableModel(f"{source} holds {len(found)} GGUF files: name the one to use")
    return found[0] if found else None


def _hub_files(source: Path) -> list[Path]:
    for name in ("config.json", "tokenizer.json"):
        if not (source / name).is_file():
            raise UnusableModel(f"{source} has neither a *.gguf nor {name}: a model folder needs one of them")
    optional = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    return [
        source / name for name in ("config.json", "tokenizer.json", *optional) if (source / name).is_file()
    ]


def _identity(files: Iterable[Path]) -> str:
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def _existing_card(folder: Path) -> ModelCard | None:
    try:
        card = msgspec.json.decode((folder / "card.json").read_bytes(), type=ModelCard)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return card if card.format == FORMAT else None


def _same_file(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _name(first: Path, folder: Path) -> str:
    """The folder's own name, unless a link tells where the files really come from."""
    real = first.resolve()
    if real.suffix == ".gguf":
        return real.stem.lower() if real.stem != "model" else folder.resolve().name
    return real.parent.name.replace("--", "/")


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# --- GGUF ------------------------------------------------------------------------------------------------------------


def _from_gguf(path: Path, name: str, identity: str) -> tuple[bytes, ModelCard]:
    from gguf import GGUFReader  # here: only `prepare` pays for it

    try:
        fields = GGUFReader(path).fields
    except (ValueError, IndexError, KeyError) as error:
        raise UnusableModel(f"{path.name} is no whole GGUF file ({error}): download it again") from error

    def read(key: str, default: Any = None) -> Any:
        return fields[key].contents() if key in fields else default

    kind, pre = read("tokenizer.ggml.model", "none"), read("tokenizer.ggml.pre", "")
    if kind != "gpt2" or pre not in SPLITS:
        what = f"tokenizer {kind!r}" if kind != "gpt2" else f"pre-tokeniser {pre or 'unnamed'!r}"
        raise UnusableModel(
            f"{path.name} has the {what}, which is not supported from GGUF (supported: gpt2 with "
            f"{', '.join(sorted(SPLITS))}): use the Hugging Face folder of this model"
        )
    tokens: list[str] = read("tokenizer.ggml.tokens", [])
    types: list[int] = read("tokenizer.ggml.token_type", [1] * len(tokens))
    architecture = str(read("general.architecture", ""))
    context_length = read(f"{architecture}.context_length")
    for key, value in ((f"{architecture}.context_length", context_length), ("tokenizer.ggml.tokens", tokens)):
        if not value:
            raise UnusableModel(f"{path.name} does not say {key}: convert the model again")
    bos, eos = read("tokenizer.ggml.bos_token_id"), read("tokenizer.ggml.eos_token_id")
    split = SPLITS[pre]
    add_bos = bos is not None and bool(read("tokenizer.ggml.add_bos_token", split.add_bos))
    special = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL}
    ends = [read(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    document = tokenizer_document(tokens, types, read("tokenizer.ggml.merges", []), split, bos if add_bos else None)
    content = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    return content, ModelCard(
        name=name,
        architecture=architecture,
        context_length=int(context_length),
        vocabulary_size=len(tokens),
        vocabulary=_digest(_parse(content, path.name)),
        bos_token_id=bos,
        eos_token_id=eos,
        stop_token_ids=_stop_ids(ends, special),
        add_bos=add_bos,
        special_tokens=special,
        chat_template=read("tokenizer.chat_template", ""),
        source=identity,
    )


# --- Hugging Face files ----------------------------------------------------------------------------------------------


def _from_hub(source: Path, name: str, identity: str) -> tuple[bytes, ModelCard]:
    config, settings = _json(source / "config.json"), _json(source / "tokenizer_config.json")
    generation = _json(source / "generation_config.json")
    content = (source / "tokenizer.json").read_bytes()
    tokenizer = _parse(content, "tokenizer.json")
    if not _is_byte_level(json.loads(content).get("decoder")):
        raise UnusableModel(
            f"the tokenizer of {name} is not byte-level (SentencePiece, say), which is not supported yet: "
            "use a model of the Llama 3, Qwen, SmolLM or Mistral Nemo families"
        )
    for key in ("max_position_embeddings", "vocab_size"):
        if not isinstance(config.get(key), int):
            raise UnusableModel(f"config.json of {name} does not say {key}")
    special = {added.content: id for id, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    bos, eos = (tokenizer.token_to_id(_content(settings.get(key))) for key in ("bos_token", "eos_token"))
    ends = [eos]
    for said in (config.get("eos_token_id"), generation.get("eos_token_id")):
        ends += said if isinstance(said, list) else [said]
    template = source / "chat_template.jinja"
    return content, ModelCard(
        name=name,
        architecture=str(config.get("model_type", "")),
        context_length=config["max_position_embeddings"],
        vocabulary_size=config["vocab_size"],
        vocabulary=_digest(tokenizer),
        bos_token_id=bos,
        eos_token_id=eos if eos is not None else next((end for end in ends if end is not None), None),
        stop_token_ids=_stop_ids(ends, special),
        add_bos=bos is not None and tokenizer.encode("").ids[:1] == [bos],
        special_tokens=special,
        chat_template=template.read_text() if template.is_file() else _default_template(settings.get("chat_template")),
        source=identity,
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise UnusableModel(f"{path.name} is no JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise UnusableModel(f"{path.name} holds no JSON object: download it again")
    return found


def _content(token: str | dict[str, Any] | None) -> str:
    """A special token as tokenizer_config.json names it: a string, or an object with `content`."""
    return token["content"] if isinstance(token, dict) else token or ""


def _default_template(said: str | list[dict[str, str]] | None) -> str:
    if isinstance(said, list):
        return next((one["template"] for one in said if one["name"] == "default"), "")
    return said or ""


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    parts = decoder.get("decoders", [decoder]) if decoder else []
    return [part["type"] for part in parts] == ["ByteLevel"]


# --- both ------------------------------------------------------------------------------------------------------------


def _parse(content: bytes, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises no narrower type
        raise UnusableModel(f"the tokenizer in {name} cannot be used: {error}") from error


def _digest(tokenizer: tokenizers.Tokenizer) -> str:
    """Equal for two models exactly when each id stands for the same token in both (padding has no token)."""
    digest = hashlib.blake2b(digest_size=16)
    for token, id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        text = token.encode()
        digest.update(id.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text)
    return digest.hexdigest()


def _vocabulary(tokenizer: tokenizers.Tokenizer, card: ModelCard) -> vocabulary.Vocabulary:
    special = [id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    return vocabulary.Vocabulary(card.vocabulary, token_bytes(tokenizer, card.vocabulary_size),
                                 list(card.stop_token_ids), sorted(special))


def _stop_ids(named: Iterable[int | None], special: Mapping[str, int]) -> tuple[int, ...]:
    known = {special[end] for end in END_OF_TURN if end in special}
    return tuple(sorted(known.union(id for id in named if id is not None)))
