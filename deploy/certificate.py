"""What a checkpoint kept of another one, with 95 % intervals.

Rule: pure statistics. Positions of one window see the same context and are not independent, so windows are what is
drawn: an interval is the middle 95 % of figures over windows drawn again with replacement, from a fixed seed.
"""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from deploy.bench.departure import Departure

RESAMPLES = 2000
SEED = 0
LEAST_WINDOWS = 4  # fewer say nothing about how windows differ

Floats = NDArray[np.float64]


class Estimate(Struct, frozen=True):
    """A figure, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Side(Struct, frozen=True, kw_only=True):
    """One of the two checkpoints."""

    name: str
    weights: int
    bytes: int  # of its files with weights
    kinds: dict[str, int]  # weights by the kind in which they are stored

    @property
    def bits_a_weight(self) -> float:
        return self.bytes * 8 / self.weights


class Text(Struct, frozen=True, kw_only=True):
    """What both predicted, and how they differ. Likelihoods in nats."""

    name: str
    licence: str
    blake2b: str  # of its bytes
    windows: int
    positions: int
    baseline_perplexity: float
    perplexity: float
    perplexity_ratio: Estimate  # the model's over the baseline's
    kl: Estimate  # mean of each position's divergence from the baseline
    top1_agreement: Estimate  # share of positions where both put the same token first


class Certificate(Struct, frozen=True, kw_only=True):
    """What certificate.json holds."""

    model: Side
    baseline: Side
    texts: list[Text]
    window_tokens: int
    resamples: int = RESAMPLES
    seed: int = SEED
    seconds: float
    versions: dict[str, str]


def compared(name: str, licence: str, blake2b: str, windows: Sequence[Departure]) -> Text:
    """The figures of one text. Windows have equally many positions. Raises ValueError for too few of them."""
    if len(windows) < LEAST_WINDOWS:
        raise ValueError(f"{name} gives {len(windows)} windows; {LEAST_WINDOWS} are the least for an interval")
    reference = np.array([np.mean(window.reference_nll) for window in windows])
    gaps = np.array([np.mean(window.other_nll) for window in windows]) - reference
    same = np.array([np.mean(window.same) for window in windows])
    kl = np.array([np.mean(window.kl) for window in windows])
    return Text(
        name=name,
        licence=licence,
        blake2b=blake2b,
        windows=len(windows),
        positions=sum(len(window.kl) for window in windows),
        baseline_perplexity=float(np.exp(reference.mean())),
        perplexity=float(np.exp((reference + gaps).mean())),
        perplexity_ratio=bootstrapped(gaps, np.exp),
        kl=bootstrapped(kl),
        top1_agreement=bootstrapped(same),
    )


def bootstrapped(windows: Floats, of_mean: Callable[[Floats], Floats] = np.asarray) -> Estimate:
    """A function of the mean over windows, and its interval."""
    drawn = np.random.default_rng(SEED).integers(0, len(windows), (RESAMPLES, len(windows)))
    figures = of_mean(windows[drawn].mean(1))
    low, high = np.quantile(figures, (0.025, 0.975))
    return Estimate(float(of_mean(windows.mean())), float(low), float(high))


def page(certificate: Certificate) -> str:
    """The certificate as one page of Markdown."""
    model, baseline = certificate.model, certificate.baseline
    lines = [
        f"# What {model.name} kept of {baseline.name}",
        "",
        "| | weights | MB | bits a weight | stored as |",
        "|---|---|---|---|---|",
        *(f"| {side.name} | {side.weights / 1e6:.1f} million | {side.bytes / 1e6:.1f} | {side.bits_a_weight:.2f} | "
          f"{_kinds(side)} |" for side in (model, baseline)),
        "",
        f"Files: {model.bytes / baseline.bytes - 1:+.1%} against {baseline.name}, "
        f"{model.bytes / model.weights / 2 - 1:+.1%} against 16 bits a weight.{_was_quantised(baseline)}",
        "",
        "| text | positions | perplexity, baseline | perplexity | ratio | KL, nats | same token first |",
        "|---|---|---|---|---|---|---|",
        *(f"| {text.name} | {text.positions:,} in {text.windows} windows | {text.baseline_perplexity:.3f} | "
          f"{text.perplexity:.3f} | {_interval(text.perplexity_ratio, '.4f')} | {_interval(text.kl, '.5f')} | "
          f"{_interval(text.top1_agreement, '.4f')} |" for text in certificate.texts),
        "",
        f"In brackets: 95 % intervals, from {certificate.resamples:,} draws of windows of {certificate.window_tokens} "
        f"tokens with replacement (seed {certificate.seed}). Both were computed in float32 from the weights as stored, "
        f"in {certificate.seconds:.0f} s, with {', '.join(map(' '.join, certificate.versions.items()))}.",
        "",
        *(f"- {text.name}: {text.licence}; BLAKE2b {text.blake2b}" for text in certificate.texts),
    ]
    return "\n".join(lines) + "\n"


def _kinds(side: Side) -> str:
    shares = sorted(side.kinds.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{count / side.weights:.1%} {kind}" for kind, count in shares if count * 1000 >= side.weights)


def _was_quantised(side: Side) -> str:
    """A sentence where the baseline had been rounded before."""
    rounded = sum(count for kind, count in side.kinds.items() if kind not in ("F32", "F16", "BF16"))
    if not rounded:
        return ""
    return f" {side.name} itself is stored in fewer than 16 bits ({_kinds(side)}): what that had lost is not counted."


def _interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
