"""`tokenmill compress`: `worker.compress.compressing`, and the tokenizer that a served model needs beside it."""

import json
import shutil
from pathlib import Path

from gateway import model_files
from worker.compress import compressing
from worker.compress.compressing import Compression, Recipe, Report

# of a Hugging Face folder, as they are
_BESIDE = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja", "special_tokens_map.json")


class CompressFailed(Exception):
    """One clear sentence on why there is no smaller model."""


def compress(model: Path, out: Path, recipe: Recipe, report: Report) -> Compression:
    """Write the pulled model `model` into the folder `out`, ready to be served. Raises CompressFailed."""
    try:
        card = model_files.load_card(model)
        ids: dict[str, object] = {"bos_token_id": card.bos_token_id, "eos_token_id": list(card.stop_token_ids)}
        gguf = not (model / "config.json").exists()
        done = compressing.compress(model, out, recipe, report, ids if gguf else None)
        for name in ("tokenizer.json", *_BESIDE):
            if (model / name).exists() and not (out / name).exists():
                shutil.copyfile(model / name, out / name)
        if gguf:
            (out / "tokenizer_config.json").write_text(json.dumps(_tokenizer_settings(model), indent=1))
        model_files.prepare(out, out)
    except (ValueError, OSError) as error:
        raise CompressFailed(str(error)) from None
    return done


def summary(done: Compression) -> list[str]:
    """What came of it, for people."""
    worst, error = max(done.errors.items(), key=lambda pair: pair[1])
    kinds = ", ".join(f"{count / done.weights:.1%} {kind}" for kind, count in
                      sorted(done.source_kinds.items(), key=lambda pair: -pair[1]))
    mean = sum(done.errors.values()) / len(done.errors)
    return [
        f"{done.weights / 1e6:.1f} million weights in {done.bytes / 1e6:.1f} MB, {done.bits_a_weight:.2f} bits each; "
        f"bf16 takes {done.weights * 2 / 1e6:.1f} MB ({done.bytes / done.weights / 2 - 1:+.1%}), the source "
        f"{done.source_bytes / 1e6:.1f} MB",
        f"the source has {kinds}: what it had lost before is not counted here",
        f"rounding changed a matrix by {mean:.3f} of its norm on average, at most by {error:.3f} ({worst})",
    ]


def _tokenizer_settings(model: Path) -> dict[str, object]:
    """tokenizer_config.json of a model that came as a GGUF."""
    card, tokenizer = model_files.load_card(model), model_files.load_tokenizer(model)
    named = {"bos_token": card.bos_token_id, "eos_token": card.eos_token_id}
    tokens = {key: tokenizer.id_to_token(id) for key, id in named.items() if id is not None}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": card.context_length,
            "chat_template": card.chat_template} | tokens
