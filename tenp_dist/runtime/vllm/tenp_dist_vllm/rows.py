"""Running the buckets of a layer with kernels that know no map of expert ids (vLLM's on CPUs).

Shape legend: T tokens, K experts per token, S = T * K slots, R slots of one bucket, D hidden size, E experts.

Every bucket gets its own (token, expert) pairs only.
"""

import torch
from torch import nn


class Slots(nn.Module):
    """Where every expert of a layer lies: `bucket_E` its bucket, `place_E` its place there; `of` both, for the host.

    Experts that are in no bucket here (width 0, or of another rank) count to one bucket after the last.
    """

    def __init__(self, buckets: list[list[int]], experts: int):
        super().__init__()
        places = {expert: (index, place) for index, ids in enumerate(buckets) for place, expert in enumerate(ids)}
        self.of = [places.get(expert, (len(buckets), 0)) for expert in range(experts)]
        bucket, place = zip(*self.of, strict=True)
        self.register_buffer("bucket_E", torch.tensor(bucket), persistent=False)
        self.register_buffer("place_E", torch.tensor(place, dtype=torch.int32), persistent=False)


def run_rows(
    buckets: nn.ModuleList, slots: Slots, x_TD: torch.Tensor, weight_TK: torch.Tensor, id_TK: torch.Tensor
) -> torch.Tensor:
    """Weighted sum of the chosen experts' outputs, [T, D]; added up in float32, bucket after bucket."""
    run = _one_token if len(id_TK) == 1 else _many_tokens
    return run(buckets, slots, x_TD, weight_TK, id_TK).to(x_TD.dtype)


def _one_token(
    buckets: nn.ModuleList, slots: Slots, x_TD: torch.Tensor, weight_TK: torch.Tensor, id_TK: torch.Tensor
) -> torch.Tensor:
    """A bucket gets the token once, with those of its K experts that it holds. What is small is done in Python."""
    total_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
    chosen = [(*slots.of[expert], k) for k, expert in enumerate(id_TK[0].tolist())]
    for index, bucket in enumerate(buckets):
        if mine := [(place, k) for owner, place, k in chosen if owner == index]:
            places, ks = zip(*mine, strict=True)
            weight_1R = weight_TK if len(ks) == len(chosen) else weight_TK[:, list(ks)]
            total_TD += bucket.forward_modular(x_TD, weight_1R, torch.tensor([places], dtype=torch.int32))
    return total_TD


def _many_tokens(
    buckets: nn.ModuleList, slots: Slots, x_TD: torch.Tensor, weight_TK: torch.Tensor, id_TK: torch.Tensor
) -> torch.Tensor:
    """Slots are sorted by bucket. Holds one bucket's rows, at most S x D, and a float32 [T, D] beside the input."""
    id_S = id_TK.reshape(-1)
    bucket_S = slots.bucket_E[id_S]
    order_S = bucket_S.argsort(stable=True)
    ends = torch.bincount(bucket_S, minlength=len(buckets) + 1).cumsum(0).tolist()
    place_S1, weight_S1 = slots.place_E[id_S][order_S, None], weight_TK.reshape(-1)[order_S, None]
    token_S = order_S // id_TK.size(1)
    total_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
    for bucket, start, end in zip(buckets, [0, *ends], ends, strict=False):
        if end > start:
            rows, token_R = slice(start, end), token_S[start:end]
            y_RD = bucket.forward_modular(x_TD[token_R], weight_S1[rows], place_S1[rows])
            total_TD.index_add_(0, token_R, y_RD.float())
    return total_TD
