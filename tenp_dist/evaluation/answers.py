"""How many items several variants answer, from their final hidden states.

A choice counts by the log-probability of its text over the number of its letters, as `acc_norm` of lm-eval, the
largest is the answer. A text matches if every token of it is the most likely one after those before it: what greedy
decoding would have written, in one pass.

Shape letters: N sequences, B of a microbatch, S tokens, M items, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from tenp_dist.calibration.items import EXACT, Items
from tenp_dist.errors import NumericalError
from tenp_dist.evaluation.metrics import States, boxes, chunk_positions
from tenp_dist.model.layers import Frame, Microbatch

ERROR = "error"


@dataclass
class Answers:
    """What variants say of every sequence, and the figures made from it.

    items: what is asked.
    first: number of the first sequence of every microbatch.
    log_N, greedy_N: variant -> log-probability of every answer, float64; whether its tokens are all the likeliest.
    """

    items: Items
    first: Sequence[int]
    log_N: dict[str, np.ndarray] = field(default_factory=dict)
    greedy_N: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, items: Items, batches: Sequence[Microbatch]) -> Answers:
        """Nothing said yet. batches: of the items' corpus, which has one domain."""
        sizes = [len(batch.tokens_BS) for batch in batches]
        return cls(items, [sum(sizes[:number]) for number in range(len(sizes))])

    def add(self, frame: Frame, number: int, batch: Microbatch, final: Mapping[str, States]) -> None:
        """Take in a microbatch. final: variant -> reader of the hidden states that left the last layer."""
        start = self.first[number]
        rows = slice(start, start + len(batch.tokens_BS))
        columns = np.arange(batch.tokens_BS.shape[1] - 1)
        begin_N1, end_N1 = self.items.begin_N[rows, None], self.items.end_N[rows, None]
        asked_BS = torch.from_numpy((columns >= begin_N1 - 1) & (columns < end_N1 - 1)).to(batch.tokens_BS.device)
        for name, read in final.items():
            log_BS, greedy_BS = _said(frame, number, batch, asked_BS, read)
            self.log_N.setdefault(name, np.zeros(len(self.items.item_N)))[rows] = log_BS.sum(dim=1).cpu()
            self.greedy_N.setdefault(name, np.zeros(len(self.items.item_N), bool))[rows] = greedy_BS.all(dim=1).cpu()

    def check_finite(self) -> None:
        """Raise NumericalError, naming the variant, where a figure is NaN or Inf."""
        for variant, log_N in self.log_N.items():
            if not np.isfinite(log_N).all():
                raise NumericalError(
                    "NaN or Inf in the logits",
                    where=f"variant {variant}, items",
                    next_step="check the final norm's and the head's weights",
                )

    def shared(self, leaders: Mapping[str, str]) -> Answers:
        """The same with what `leaders[variant]` said for every variant, in the order of `leaders`."""
        of_each = ({name: said[leader] for name, leader in leaders.items()} for said in (self.log_N, self.greedy_N))
        return Answers(self.items, self.first, *of_each)

    def summary(self) -> dict[str, dict[str, float]]:
        """variant -> accuracy, error (what is left to 1), nll (of a token of the right answers)."""
        return {name: self._figures(name) for name in self.log_N}

    def _figures(self, name: str) -> dict[str, float]:
        items, log_N = self.items, self.log_N[name]
        right = int(answered(items, log_N, self.greedy_N[name]).sum())
        count, of_right = len(items.right_M), items.right_N
        nll = -math.fsum(log_N[of_right]) / int((items.end_N - items.begin_N)[of_right].sum())
        return {"accuracy": right / count, ERROR: (count - right) / count, "nll": nll}


def answered(items: Items, log_N: np.ndarray, greedy_N: np.ndarray) -> np.ndarray:
    """Whether an item is answered rightly, bool [M]; of equal choices the first is the answer."""
    by_letter = log_N / items.letters_N
    ends = [*items.first_M[1:], len(log_N)]
    found = [
        bool(greedy_N[start]) if right == EXACT else int(by_letter[start:end].argmax()) == right
        for start, end, right in zip(items.first_M, ends, items.right_M, strict=True)
    ]
    return np.array(found)


def _said(
    frame: Frame, number: int, batch: Microbatch, asked_BS: torch.Tensor, read: States
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the next token where it is asked for, 0 elsewhere, float64; and whether it is the likeliest,
    true elsewhere. Both [B, S - 1]."""
    targets_BS = batch.tokens_BS[:, 1:]
    log_BS, greedy_BS = torch.zeros_like(asked_BS, dtype=torch.float64), torch.ones_like(asked_BS)
    for box in boxes((asked_BS.shape[0], asked_BS.shape[1]), chunk_positions(frame)):
        here = asked_BS[box]
        if not bool(here.any()):
            continue
        targets_T = targets_BS[box][here]
        log_TV = torch.log_softmax(frame.logits(read(number, box)[here]).float(), dim=-1)
        log_BS[box] = log_BS[box].masked_scatter(here, log_TV.gather(1, targets_T[:, None])[:, 0].double())
        greedy_BS[box] = greedy_BS[box].masked_scatter(here, log_TV.argmax(dim=-1) == targets_T)
    return log_BS, greedy_BS
