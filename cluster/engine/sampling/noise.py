"""Random numbers that are a function of (seed, position, vocabulary id) and of nothing else.

Philox4x32-10 (Salmon et al., SC 2011): key = the request's seed, counter = (id // 4, position, 0, 0);
lane id % 4 of the output belongs to the id. So a token is drawn with the same noise by any worker, in
any batch, with the vocabulary cut into any columns, and by a verifier of speculated tokens.

Shape legend: R rows, C candidate ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.engine.sampling import elementary

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_NUM_ROUNDS = 10
LARGEST_BELOW_ONE = 1.0 - 2.0**-24

Draw = tuple[int, int]  # (seed, absolute position of the token to be drawn)


def philox_bits(draws: Sequence[Draw], ids_C: torch.Tensor) -> torch.Tensor:
    """(R, C) int64 in [0, 2**32): the random bits of each id, for each draw. `ids_C` is int64."""
    lanes = _philox(draws, ids_C >> 2)
    return lanes.gather(0, (ids_C & 3).expand(1, len(draws), -1)).squeeze(0)


def philox_bits_of_all(draws: Sequence[Draw], vocab_size: int, device: torch.device) -> torch.Tensor:
    """(R, V) int64: `philox_bits` of the ids 0..V-1, with one evaluation for each four of them."""
    groups = torch.arange(-(-vocab_size // 4), device=device)
    lanes = _philox(draws, groups)
    return lanes.permute(1, 2, 0).reshape(len(draws), -1)[:, :vocab_size]


def gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise -ln(-ln(1 - w)) with w = (bits + 1/2) / 2**32, fp32, elementwise.

    Large noise, which decides who wins, comes from small w, where fp32 resolves best. ln(1 - w) is taken
    as ln(u) * w / (1 - u) with u = fl(1 - w), exact to a few ulp for tiny w (W. Kahan).
    """
    w = bits.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_BELOW_ONE)
    u = 1.0 - w
    rest = 1.0 - u  # 0 where w is too small to change 1: there -ln(1 - w) is w itself
    exponential = torch.where(rest == 0.0, w, elementary.log(u).neg_().mul_(w).div_(rest))
    return elementary.log(exponential).neg_()


def _philox(draws: Sequence[Draw], groups_C: torch.Tensor) -> torch.Tensor:
    """(4, R, C) int64. Products of two 32-bit numbers wrap in int64, but their bits are right."""
    device = groups_C.device
    key = torch.tensor([[seed & _MASK, seed >> 32] for seed, _ in draws], device=device).t().unsqueeze(-1)
    position = torch.tensor([position for _, position in draws], device=device).unsqueeze(-1)
    shape = (2, len(draws), len(groups_C))
    factors = torch.zeros(shape, dtype=torch.int64, device=device)  # counter words 0 and 2
    factors[0] = groups_C
    others = torch.zeros(shape, dtype=torch.int64, device=device)  # counter words 1 and 3
    others[0] = position
    multipliers = torch.tensor(_MULTIPLIERS, device=device).view(2, 1, 1)
    increments = torch.tensor(_KEY_INCREMENTS, device=device).view(2, 1, 1)
    for _ in range(_NUM_ROUNDS):
        products = factors * multipliers
        high = (products >> 32).bitwise_and_(_MASK).flip(0)
        factors = high.bitwise_xor_(others).bitwise_xor_(key)
        others = products.bitwise_and_(_MASK).flip(0)
        key = (key + increments).bitwise_and_(_MASK)
    return torch.stack((factors[0], others[0], factors[1], others[1]))
