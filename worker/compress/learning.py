"""What a step of training learns: the target's thoughts of its own words, as far as the head can say them.

Rule: the loss moves from the likelihood to what decides about acceptance: lambda * KL + (1 - lambda) * total variation,
where lambda = exp(-3 * overlap) (the hybrid of the LK losses, as vllm-project/speculators has it). Total variation
alone teaches nothing to a student that is far off.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from worker.compress.student import Student
from worker.compress.writing import Document, Lessons

WARM_UP_STEPS = 20
FINAL_RATE = 0.1
# tokens that the drafter goes on with by itself, in the last steps
ROLLOUT_TOKENS = 8
# a place where the head can say less than this of what the target thought teaches nothing
LEAST_MASS = 0.05


def most_said(documents: Sequence[Document], wanted: int, vocabulary: int, stops: Sequence[int]) -> list[int]:
    """The ids said most often, ascending, and those that end an answer; the lowest ones where too few were said."""
    counts = np.zeros(vocabulary, np.int64)
    for tokens, first in documents:
        counts += np.bincount(tokens[first:], minlength=vocabulary)
    counts[[id for id in stops if id < vocabulary]] = np.iinfo(np.int64).max
    chosen: NDArray[np.int64] = np.argsort(-counts, kind="stable")[:min(wanted, vocabulary)]
    return sorted(chosen.tolist())


def losses_of(student: Student, documents: Sequence[Document], thoughts: Sequence[Lessons],
              rows_of: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of these texts, and by how much student and target overlap: 1 - total variation, about."""
    device = rows_of.device
    longest = max(len(one.tokens) for one in documents)
    tokens = torch.zeros(len(documents), longest, dtype=torch.long)
    for row, one in zip(tokens, documents, strict=True):
        row[:len(one.tokens)] = torch.from_numpy(one.tokens.astype(np.int64))
    hidden = student(tokens[:, :-1].to(device))
    before = torch.cat([hidden[at, one.first - 1:len(one.tokens) - 1] for at, one in enumerate(documents)])
    logq = F.log_softmax(student.logits(before).float(), -1)  # [N, H]
    rows = rows_of[torch.from_numpy(np.concatenate([one.ids for one in thoughts]).astype(np.int64)).to(device)]
    logp = torch.from_numpy(np.concatenate([one.logp for one in thoughts])).to(device).float()
    known = rows >= 0
    p = torch.where(known, logp.exp(), 0.0)
    mass = p.sum(-1, keepdim=True)  # of what the target thought, what the head can say
    p = p / mass.clamp(min=1e-6)
    theirs = logq.gather(-1, rows.clamp(min=0))
    weight = (mass.squeeze(-1) > LEAST_MASS).float()
    total = weight.sum().clamp(min=1.0)
    divergence = ((p * (p.clamp(min=1e-9).log() - theirs)).sum(-1) * weight).sum() / total
    overlap = ((torch.minimum(p, theirs.exp()) * known).sum(-1) * weight).sum() / total
    share = torch.exp(-3.0 * overlap.detach())
    return share * divergence + (1.0 - share) * (1.0 - overlap), overlap.detach()


def continued(student: Student, documents: Sequence[Document], random: np.random.Generator,
              device: str) -> list[Document]:
    """Each text up to a place in its answer, and then what the drafter says at temperature 1."""
    cut = [int(random.integers(one.first, len(one.tokens))) for one in documents]
    texts = [one.tokens[:at].tolist() for one, at in zip(documents, cut, strict=True)]
    names = torch.tensor(student.config.head_ids, device=device)
    with torch.no_grad():
        for _ in range(ROLLOUT_TOKENS):
            longest = max(map(len, texts))
            tokens = torch.zeros(len(texts), longest, dtype=torch.long)
            for row, text in zip(tokens, texts, strict=True):
                row[:len(text)] = torch.tensor(text)
            hidden = student(tokens.to(device))
            last = torch.stack([hidden[at, len(text) - 1] for at, text in enumerate(texts)])
            logits = student.logits(last).float()
            noise = torch.from_numpy(random.gumbel(size=tuple(logits.shape))).to(device)
            for text, token in zip(texts, names[(logits + noise).argmax(-1)].tolist(), strict=True):
                text.append(token)
    return [Document(np.array(text, np.int32), at) for text, at in zip(texts, cut, strict=True)]


def rate(step: int, steps: int) -> float:
    """The learning rate, as a share of its peak: up in a line, down in half a cosine. `steps` 0: not known yet."""
    if step < WARM_UP_STEPS or not steps:
        return min(1.0, (step + 1) / WARM_UP_STEPS)
    done = min(1.0, (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS))
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2


def head_rows(student: Student, device: str) -> Tensor:
    """The row of each id in the student's head; -1: it has none."""
    rows = torch.full((student.config.vocabulary,), -1, dtype=torch.long)
    ids = torch.tensor(student.config.head_ids)
    rows[ids] = torch.arange(len(ids))
    return rows.to(device)
