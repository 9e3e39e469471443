"""`tokenmill distil`: prompts as the target reads them, `worker.compress.distil`, and what a drafter needs beside it.

The text of prompts ends here: what learns knows token ids alone.
"""

import shutil
from pathlib import Path

import msgspec

from deploy import distil_prompts
from deploy.paths import cache_folder
from gateway import model_files
from gateway.prompt import ServedModel
from worker.compress.distil import Certificate, Distillation, Prompts, Recipe, Report, ends_of

# the day that chat templates are told, so that prompts are the same every day
TEMPLATE_TIME_S = 1_750_000_000.0


class DistilFailed(Exception):
    """One clear sentence on why there is no drafter."""


def distil(target: Path, out: Path, *, layers: str, prompts_file: Path | None, device: str, report: Report,
           **counts: float) -> Certificate:
    """Make a drafter of the pulled model `target` in `out`. `layers`: how many, or which, as in 0,1,28,29.

    Raises DistilFailed.
    """
    from kernels.checkpoint import open_checkpoint

    try:
        total = open_checkpoint(target).config.layers
        recipe = Recipe(layers=_layers(layers, total), half=_half_is_fast(device),
                        shard=32 if device == "cpu" else 512, **counts)  # type: ignore[arg-type]
        prompts = _prompts(target, prompts_file, recipe.seed)
        certificate = Distillation(target, out, recipe, prompts, device, report).run()
        if not (out / "tokenizer.json").exists():
            shutil.copyfile(target / "tokenizer.json", out / "tokenizer.json")
        model_files.prepare(out, out)
    except (ValueError, OSError) as error:
        raise DistilFailed(str(error)) from None
    return certificate


def folder_for(target: Path) -> Path:
    """Where a drafter of the pulled model `target` goes when nobody says."""
    return cache_folder() / "drafters" / target.name


def summary(certificate: Certificate) -> list[str]:
    """The certificate for people."""
    lines = [f"{certificate.vocabulary:,} ids that were {certificate.coverage:.1%} of held-out answers, "
             f"{certificate.active_weights / 1e6:.1f} of {certificate.target_weights / 1e6:.1f} million weights a "
             f"token, learned in {certificate.steps:,} steps from {certificate.training_tokens:,} tokens",
             "", f"{'held-out text':15} {'draft temperature':>17} {'right':>7} "
             + " ".join(f"{f'of {drafts}':>8}" for drafts in certificate.acceptance[0].tokens_a_step)]
    for name, rows in (("copied", certificate.copied), ("learned", certificate.acceptance)):
        lines.append(name)
        lines += [f"  {row.text:13} {row.draft_temperature:17g} {row.rate:7.1%} "
                  + " ".join(f"{tokens:8.2f}" for tokens in row.tokens_a_step.values()) for row in rows]
    return lines


def _prompts(target: Path, file: Path | None, seed: int) -> Prompts:
    model = ServedModel.load(target, "target")
    training, held_out = (distil_prompts.split([line for line in file.read_text().splitlines() if line.strip()])
                          if file is not None else distil_prompts.questions(seed))

    def ids(text: str) -> list[int]:
        if not model.card.chat_template:
            return model.text(text)
        return model.chat([{"role": "user", "content": text}], now_s=TEMPLATE_TIME_S)

    return Prompts([ids(text) for text in training], [ids(text) for text in held_out], model.card.stop_token_ids)


def _layers(said: str, total: int) -> tuple[int, ...]:
    try:
        named = [int(part) for part in said.split(",")]
    except ValueError:
        raise ValueError(f"--layers {said!r} is no number and no list of layers: say 4, or 0,1,28,29") from None
    if len(named) == 1:
        return ends_of(total, named[0])
    if sorted(set(named)) != named or named[-1] >= total or named[0] < 0:
        raise ValueError(f"--layers {said} must ascend within 0..{total - 1}")
    return tuple(named)


def _half_is_fast(device: str) -> bool:
    """Whether products in bfloat16 are quicker than in float32 here."""
    if device != "cpu":
        return True
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def encoded(certificate: Certificate) -> bytes:
    return msgspec.json.format(msgspec.json.encode(certificate), indent=2)
