"""Seeded runs of the operations on experts: rows that tie, rows of NaN, experts with all rows and with none."""

from __future__ import annotations

import torch

from cluster.engine.kernels.ops import Ops
from cluster.engine.kernels.probes import EqualsItself, Magnitudes, Outputs, Probe, draw


def router_logits(rows: int, num_experts: int, seed: int) -> torch.Tensor:
    """(rows + 5, E) fp32: some rows of ordinary logits, some in coarse steps, so that many tie; then one of
    equal logits, one with a single possible expert, and three that are broken: NaN, infinity, nothing possible."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((rows + 5, num_experts), generator=generator) * 3
    logits[::2] = (logits[::2] * 2).round() / 2
    logits[rows] = 0.25
    logits[rows + 1, 1:] = -torch.inf
    logits[rows + 2, num_experts // 2] = torch.nan
    logits[rows + 3, 1] = torch.inf
    logits[rows + 4] = -torch.inf
    return logits


def random_choice(rows: int, num_experts: int, top_k: int, seed: int) -> torch.Tensor:
    """(rows, top_k) int32, ascending in each row. The last expert is in every other row, the first in none."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand((rows, num_experts), generator=generator)
    scores[:, 0] = -1.0
    scores[::2, -1] = 2.0
    return scores.topk(top_k, dim=1).indices.sort(dim=1).values.int()


def route_probe(rows: int, num_experts: int, top_k: int, *, renormalise: bool) -> Probe:
    def run(ops: Ops) -> Outputs:
        logits = router_logits(rows, num_experts, seed=rows).to(ops.device)
        choice = ops.moe_route(logits, top_k, renormalise=renormalise)
        return choice.experts_TJ, choice.weights_TJ

    return Probe(f"moe_route {rows}x{num_experts} top {top_k}", run)


def experts_probe(rows: int, num_experts: int, hidden: int, features: int, top_k: int, magnitudes: Magnitudes) -> Probe:
    """All experts, with a row of NaN if there are several; then all but the first two, as a rank may hold them."""

    def run(ops: Ops) -> Outputs:
        x, gate_up, down = _operands(rows, num_experts, hidden, features, magnitudes)
        if rows > 1:
            x[rows // 2] = torch.nan
        x, gate_up, down = (tensor.to(ops.device) for tensor in (x, gate_up, down))
        experts = random_choice(rows, num_experts, top_k, seed=rows).to(ops.device)
        whole = ops.moe_experts(x, experts, ops.pack_experts(gate_up), ops.pack_experts(down))
        packed = ops.pack_experts(gate_up[2:]), ops.pack_experts(down[2:])
        part = ops.moe_experts(x, experts, *packed, first_expert=2)
        return whole, part.where((experts >= 2)[:, :, None], torch.zeros_like(part))

    return Probe(f"moe_experts {rows} of {num_experts}x{hidden}x{features} {magnitudes.value}", run)


def combine_probe(rows: int, top_k: int, width: int, magnitudes: Magnitudes) -> Probe:
    def run(ops: Ops) -> Outputs:
        generator = torch.Generator().manual_seed(rows + width)
        values = draw(generator, rows * top_k, width, magnitudes).to(ops.residual_dtype)
        weights = torch.rand((rows, top_k), generator=generator)
        return (ops.moe_combine(values.view(rows, top_k, width).to(ops.device), weights.to(ops.device)),)

    return Probe(f"moe_combine {rows}x{top_k}x{width} {magnitudes.value}", run)


def expert_rows_case(rows: int, num_experts: int, features: int, hidden: int) -> EqualsItself:
    """Many rows at once, against each row alone through the linear layers of its experts."""
    top_k = 2

    def operands(ops: Ops) -> tuple[torch.Tensor, ...]:
        experts = random_choice(rows, num_experts, top_k, seed=1)
        tensors = (*_operands(rows, num_experts, hidden, features, Magnitudes.NORMAL), experts)
        return tuple(tensor.to(ops.device) for tensor in tensors)

    def at_once(ops: Ops) -> Outputs:
        x, gate_up, down, experts = operands(ops)
        return (ops.moe_experts(x, experts, ops.pack_experts(gate_up), ops.pack_experts(down)),)

    def one_by_one(ops: Ops) -> Outputs:
        x, gate_up, down, experts = operands(ops)
        layers = [(ops.pack_linear(up), ops.pack_linear(out)) for up, out in zip(gate_up, down, strict=True)]

        def row(index: int, expert: int) -> torch.Tensor:
            active = ops.linear_silu_mul(x[index : index + 1], layers[expert][0])
            return ops.linear(active, layers[expert][1], out_dtype=ops.residual_dtype)

        every = [torch.cat([row(index, expert) for expert in chosen]) for index, chosen in enumerate(experts.tolist())]
        return (torch.stack(every),)

    return EqualsItself(f"moe {rows} rows of {num_experts} experts at once, one by one", at_once, one_by_one)


def _operands(
    rows: int, num_experts: int, hidden: int, features: int, magnitudes: Magnitudes
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bf16 x (T, K), gate_up (E, 2F, K) and down (E, K, F)."""
    generator = torch.Generator().manual_seed(rows * hidden + features)
    x = draw(generator, rows, hidden, magnitudes).bfloat16()
    gate_up = draw(generator, num_experts * 2 * features, hidden, Magnitudes.NORMAL) * hidden**-0.5
    down = draw(generator, num_experts * hidden, features, magnitudes)
    return x, gate_up.bfloat16().view(num_experts, -1, hidden), down.bfloat16().view(num_experts, hidden, features)
