"""What is derived from a model's files, and what is refused."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gguf import GGUFWriter

from gateway.model_files import ModelCard, UnusableModel, load_card, load_tokenizer, prepare
from gateway.tokenizer import Tokenizer
from tests.models import default_folder

CONTROL, NORMAL, UNUSED, USER_DEFINED = 3, 1, 5, 4
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTES = [chr(byte) for byte in SHOWN] + [chr(256 + i) for i in range(len(HIDDEN))]
ADDED = {"<|begin|>": CONTROL, "<|im_end|>": CONTROL, "<|eot_id|>": CONTROL, "<think>": USER_DEFINED}
BOS, IM_END, EOT, THINK = range(259, 263)


def write_gguf(path: Path, *, pre: str = "gpt-2", model: str = "gpt2", padding: int = 0, **extra: Any) -> Path:
    """A model without weights: all bytes, three merges, four added tokens, `padding` unused ids."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    merged = ["he", "ll", "hell"]
    tokens = [*BYTES, *merged, *ADDED, *(f"[PAD{i}]" for i in range(padding))]
    writer.add_token_list(tokens)
    writer.add_token_types([NORMAL] * 259 + list(ADDED.values()) + [UNUSED] * padding)
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(IM_END)
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}")
    for key, value in extra.items():
        getattr(writer, key)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_hub_folder(folder: Path, gguf: Path) -> Path:
    """The same vocabulary as a Hugging Face folder."""
    prepare(gguf, folder)
    (folder / "card.json").unlink()
    config = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 320, "eos_token_id": [IM_END]}
    settings = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|im_end|>", "chat_template": "{{ bos_token }}"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny-model").mkdir()
    return tmp_path / "tiny-model"


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_default_model_has_this_card() -> None:
    card = load_card(default_folder())
    assert (card.architecture, card.context_length, card.vocabulary_size) == ("llama", 8192, 49152)
    assert (card.bos_token_id, card.eos_token_id, card.add_bos) == (1, 2, False)
    assert card.stop_token_ids == (0, 2)
    assert card.special_tokens["<|im_end|>"] == 2 and len(card.special_tokens) == 17
    # workers and drafters compare this: a change splits a fleet that is being upgraded
    assert card.vocabulary == "8372fd06f7515239899ea99225cd5440"


def test_a_gguf_becomes_a_tokenizer_and_a_card(folder: Path) -> None:
    card = prepare(write_gguf(folder / "model.gguf", padding=5), folder)
    assert card == load_card(folder)
    assert card.name == "tiny-model"
    assert (card.context_length, card.vocabulary_size) == (4096, 268)
    assert card.stop_token_ids == (IM_END, EOT), "all end-of-turn tokens, not only the one that is named"
    assert card.special_tokens == {"<|begin|>": BOS, "<|im_end|>": IM_END, "<|eot_id|>": EOT}
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("<think>hello<|im_end|>")
    assert [tokenizer.token_bytes(id) for id in ids] == [b"<think>", b"hell", b"o", b"<|im_end|>"]
    assert tokenizer.decode(ids, skip_special=True) == "<think>hello"
    assert tokenizer.token_bytes(267) == b"", "padding has no text"


def test_every_byte_survives_the_round_trip(folder: Path) -> None:
    prepare(write_gguf(folder / "model.gguf"), folder)
    tokenizer = Tokenizer.load(folder)
    assert sorted(tokenizer.token_bytes(id) for id in range(256)) == [bytes([byte]) for byte in range(256)]
    text = "".join(map(chr, range(0x300))) + "\ufeff\U0010ffff"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "I'm  at 1234\n\n  x", ["I", "'m", " ", " at", " 1234", "\n\n ", " x"]),
        ("smollm", "I'm  at 1234\n\n  x", ["I", "'m", " ", " at", " ", "1", "2", "3", "4", "\n\n ", " x"]),
        ("llama-bpe", "I'M  at 1234\n\n  x!?\n", ["I", "'M", " ", " at", " ", "123", "4", "\n\n", " ", " x", "!?\n"]),
        ("qwen2", "I'M  at 1234\n\n  x!?\n", ["I", "'M", " ", " at", " ", *"1234", "\n\n", " ", " x", "!?\n"]),
        ("tekken", "camelCase I'm 12 a/\n", ["camel", "Case", " I", "'m", " ", "1", "2", " a", "/\n"]),
        ("gpt-4o", "camelCase I'm 1234 a/\n", ["camel", "Case", " I'm", " ", "123", "4", " a", "/\n"]),
    ],
)
def test_each_pre_tokeniser_cuts_as_its_model_was_trained(
    folder: Path, pre: str, text: str, pieces: list[str]
) -> None:
    prepare(write_gguf(folder / "model.gguf", pre=pre), folder)
    library = load_tokenizer(folder)
    assert library.pre_tokenizer is not None
    spans = [span for _, span in library.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[low:high] for low, high in spans] == pieces


def test_only_qwen_composes_accents(folder: Path) -> None:
    prepare(write_gguf(folder / "model.gguf", pre="qwen2"), folder)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")
    prepare(write_gguf(folder / "model.gguf", pre="llama-bpe"), folder)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("e\u0301") != tokenizer.encode("é")


def test_plain_text_begins_with_bos_where_the_model_wants_it(folder: Path) -> None:
    for pre, said, wanted in (("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", True, True)):
        extra = {} if said is None else {"add_add_bos_token": said}
        card = prepare(write_gguf(folder / "model.gguf", pre=pre, **extra), folder)
        tokenizer = Tokenizer.load(folder)
        assert card.add_bos is wanted
        assert tokenizer.encode("o")[0] == (BOS if wanted else tokenizer.encode("o", add_special=False)[0])
        assert BOS not in tokenizer.encode("o", add_special=False)


def test_a_hub_folder_and_a_gguf_of_one_model_have_the_same_vocabulary(tmp_path: Path, folder: Path) -> None:
    gguf = write_gguf(tmp_path / "model.gguf", pre="llama-bpe", padding=7)
    from_gguf = prepare(gguf, tmp_path)
    hub = write_hub_folder(folder, gguf)
    before = (hub / "tokenizer.json").read_bytes()
    from_hub = prepare(hub, hub)
    assert from_hub.vocabulary == from_gguf.vocabulary, "padding does not count"
    assert (from_hub.vocabulary_size, from_hub.context_length, from_hub.add_bos) == (320, 4096, True)
    assert (from_hub.bos_token_id, from_hub.eos_token_id) == (BOS, IM_END)
    assert from_hub.stop_token_ids == (IM_END, EOT)
    assert from_hub.chat_template == "{{ bos_token }}"
    assert (hub / "tokenizer.json").read_bytes() == before


def test_a_hub_folder_can_be_prepared_elsewhere(tmp_path: Path, folder: Path) -> None:
    hub = write_hub_folder(folder, write_gguf(tmp_path / "model.gguf"))
    (hub / "chat_template.jinja").write_text("a file of its own")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    card = prepare(hub, elsewhere)
    assert card.name == "tiny-model"
    assert card.chat_template == "a file of its own"
    assert load_tokenizer(elsewhere).to_str() == load_tokenizer(hub).to_str()


def test_a_model_is_called_what_its_files_are_called_also_through_links(tmp_path: Path, folder: Path) -> None:
    real = write_gguf(tmp_path / "Tiny-1B.Q8_0.gguf")
    (folder / "model.gguf").symlink_to(real)
    assert prepare(folder / "model.gguf", folder).name == "tiny-1b.q8_0"
    hub = tmp_path / "owner--name"
    hub.mkdir()
    assert prepare(write_hub_folder(hub, real), hub).name == "owner/name"


def test_other_tokens_are_another_vocabulary(folder: Path) -> None:
    path = write_gguf(folder / "model.gguf")
    first = prepare(path, folder).vocabulary
    path.write_bytes(path.read_bytes().replace(b"<think>", b"<thing>"))
    assert prepare(path, folder).vocabulary != first


# --- once ------------------------------------------------------------------------------------------------------------


def test_a_second_time_nothing_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(folder / "model.gguf")
    card = prepare(path, folder)

    def forbidden(*_: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(Path, "write_bytes", forbidden)
    assert prepare(path, folder) == card
    assert sorted(file.name for file in folder.iterdir()) == ["card.json", "model.gguf", "tokenizer.json",
                                                              "vocabulary.msgpack"]


@pytest.mark.parametrize("damage", ["no tokenizer", "half a card", "old format"])
def test_what_is_missing_damaged_or_old_is_written_again(folder: Path, damage: str) -> None:
    path = write_gguf(folder / "model.gguf")
    card = prepare(path, folder)
    if damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "half a card":
        (folder / "card.json").write_bytes((folder / "card.json").read_bytes()[:50])
    else:
        (folder / "card.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(card, format=0, name="old")))
    assert prepare(path, folder) == card
    assert Tokenizer.load(folder).encode("hell")


def test_new_weights_mean_a_new_card(folder: Path) -> None:
    first = prepare(write_gguf(folder / "model.gguf"), folder)
    second = prepare(write_gguf(folder / "model.gguf", padding=3), folder)
    assert second.vocabulary_size == first.vocabulary_size + 3


def test_a_card_reads_fields_it_does_not_know(folder: Path) -> None:
    card = ModelCard(name="a", architecture="b", context_length=1, vocabulary_size=2, vocabulary="c")
    (folder / "card.json").write_text(json.dumps(msgspec.to_builtins(card) | {"newer": True}))
    assert load_card(folder) == card


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ({"pre": "deepseek-v3"}, "deepseek-v3"),
        ({"pre": "default"}, "default"),
        ({"model": "llama"}, "llama"),
        ({"model": "t5"}, "t5"),
    ],
)
def test_a_tokenizer_that_could_only_be_guessed_is_refused_by_name(
    folder: Path, made: dict[str, str], named: str
) -> None:
    path = write_gguf(folder / "model.gguf", **made)
    with pytest.raises(UnusableModel, match=f"'{named}'"):
        prepare(path, folder)
    assert [file.name for file in folder.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("length", [0, 3, 100, 3000])
def test_a_gguf_that_was_cut_off_is_told_as_such(folder: Path, length: int) -> None:
    path = write_gguf(folder / "model.gguf")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UnusableModel, match=r"model\.gguf"):
        prepare(path, folder)
    assert [file.name for file in folder.iterdir()] == ["model.gguf"]


def test_a_gguf_without_a_vocabulary_is_told_as_such(folder: Path) -> None:
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(4096)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnusableModel, match="tokens"):
        prepare(folder / "model.gguf", folder)


def test_a_folder_without_a_model_says_what_is_missing(folder: Path) -> None:
    with pytest.raises(UnusableModel, match=r"config\.json"):
        prepare(folder, folder)
    with pytest.raises(UnusableModel, match="does not exist"):
        prepare(folder / "nowhere", folder)
    (folder / "weights.bin").write_bytes(b"x")
    with pytest.raises(UnusableModel, match="GGUF"):
        prepare(folder / "weights.bin", folder)
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(b"x")
    with pytest.raises(UnusableModel, match="2 GGUF files"):
        prepare(folder, folder)


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", "{}", "max_position_embeddings"),
        ("config.json", "{", "no JSON"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("tokenizer_config.json", "[]", "no JSON object"),
    ],
)
def test_a_hub_folder_with_a_broken_file_names_it(
    tmp_path: Path, folder: Path, file: str, content: str, told: str
) -> None:
    hub = write_hub_folder(folder, write_gguf(tmp_path / "model.gguf"))
    (hub / file).write_text(content)
    with pytest.raises(UnusableModel, match=told):
        prepare(hub, hub)
    assert not (hub / "card.json").exists()


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path, folder: Path) -> None:
    hub = write_hub_folder(folder, write_gguf(tmp_path / "model.gguf"))
    document = json.loads((hub / "tokenizer.json").read_text())
    document["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    (hub / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UnusableModel, match="byte-level"):
        prepare(hub, hub)


def test_a_folder_that_was_never_prepared_says_what_to_run(folder: Path) -> None:
    with pytest.raises(UnusableModel, match="tokenmill pull"):
        load_card(folder)
    with pytest.raises(UnusableModel, match="tokenmill pull"):
        load_tokenizer(folder)
