"""How far the predictions of one way to compute a model lie from those of a reference.

Rule: pure statistics over logits; who computed them is not known here. Natural logarithms, float64.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959964
ROWS_AT_ONCE = 64  # a row of float64 logits is some 400 kB


@dataclass
class Departure:
    """Positions compared so far: one entry of each list for every position."""

    same: list[bool] = field(default_factory=list)  # both put the same token first
    kl: list[float] = field(default_factory=list)  # of the other from the reference, nats
    reference_nll: list[float] = field(default_factory=list)  # of the token that really came next, nats
    other_nll: list[float] = field(default_factory=list)

    def add(self, reference: NDArray[np.float32], other: NDArray[np.float32], targets: NDArray[np.int32]) -> None:
        """Compare logits [N, V] of N positions, with the tokens [N] that followed. Raises ValueError for odd shapes."""
        if reference.shape != other.shape or targets.shape != reference.shape[:1]:
            raise ValueError(f"logits {reference.shape} and {other.shape} do not belong to {targets.shape} tokens")
        for at in range(0, len(targets), ROWS_AT_ONCE):
            part = slice(at, at + ROWS_AT_ONCE)
            p, q = log_softmax(reference[part]), log_softmax(other[part])
            rows = np.arange(len(p))
            self.same += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
            self.kl += kl_divergence(p, q).tolist()
            self.reference_nll += (-p[rows, targets[part]]).tolist()
            self.other_nll += (-q[rows, targets[part]]).tolist()

    def figures(self) -> dict[str, float | int]:
        """What a report says of them. Raises ValueError when nothing was compared."""
        if not self.kl:
            raise ValueError("no position was compared")
        low, high = wilson(sum(self.same), len(self.same))
        ratio, error = perplexity_ratio(self.reference_nll, self.other_nll)
        return {
            "positions": len(self.kl),
            "top1_agreement": sum(self.same) / len(self.same),
            "top1_low": low,
            "top1_high": high,
            "kl_mean": float(np.mean(self.kl)),
            "kl_mean_error": standard_error(self.kl),
            "kl_median": float(np.median(self.kl)),
            "kl_p99": float(np.quantile(self.kl, 0.99)),
            "kl_max": max(self.kl),
            "reference_perplexity": math.exp(float(np.mean(self.reference_nll))),
            "perplexity": math.exp(float(np.mean(self.other_nll))),
            "perplexity_ratio": ratio,
            "perplexity_ratio_error": error,
        }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log probabilities [N, V] of logits [N, V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def kl_divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p || q) of each row of log probabilities [N, V]; nats, never below zero."""
    divergence: NDArray[np.float64] = np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)
    return divergence


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval for a share; 95 % with the default `z`."""
    share, square = successes / trials, z * z / trials
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / trials + square / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def perplexity_ratio(reference_nll: list[float], other_nll: list[float]) -> tuple[float, float]:
    """The other's perplexity over the reference's on the same tokens, and its standard error (positions are paired)."""
    gaps = np.subtract(other_nll, reference_nll)
    ratio = math.exp(float(gaps.mean()))
    return ratio, ratio * standard_error(gaps.tolist())


def standard_error(values: list[float]) -> float:
    """Of the mean, as if the values were independent; infinite for fewer than two."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
