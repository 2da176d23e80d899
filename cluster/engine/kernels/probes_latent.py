"""Seeded runs of latent attention and of DeepSeek's choice of experts: what `probes.py` is to the other operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.engine.kernels.ops import AttentionMetadata, GroupedRouting, Ops
from cluster.engine.kernels.probes import CacheShape, Magnitudes, Outputs, PagedInputs, Probe, draw
from cluster.engine.kernels.probes_moe import router_logits

NOPE_SIZE = 16  # of the queries here: how wide they are before they meet the latent rows


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Geometry and content of a probe. Rows are positions start .. end of each sequence."""

    latent_size: int
    rope_size: int
    num_heads: int
    block_size: int
    sequences: Sequence[tuple[int, int]]
    magnitudes: Magnitudes = Magnitudes.NORMAL

    @property
    def name(self) -> str:
        spans = ",".join(f"{start}-{end}" for start, end in self.sequences)
        return f"L{self.latent_size}+{self.rope_size} H{self.num_heads} rows {spans} {self.magnitudes.value}"


class LatentInputs:
    """A cache with holes whose free memory is NaN, and rows and queries of some sequences."""

    def __init__(self, shape: LatentShape, device: torch.device, seed: int = 0) -> None:
        s = self.shape = shape
        self.device = device
        row_size = s.latent_size + s.rope_size
        # Block tables, slots and positions are those of a cache with one head.
        self._paged = PagedInputs(CacheShape(s.rope_size, 1, 1, s.block_size, s.sequences), device, seed)
        self.cos_sin_PR = self._paged.cos_sin_PD
        generator = torch.Generator().manual_seed(seed + 1)
        lengths = [end for _, end in s.sequences]
        self.rows = [self._rows(generator, length).to(device) for length in lengths]
        query_width = s.num_heads * (NOPE_SIZE + s.rope_size)
        self.queries = [self._queries(generator, length, query_width).to(device) for length in lengths]
        self.norm_L = torch.rand(s.latent_size, generator=generator).add(0.5).to(device)
        up = draw(generator, s.num_heads * s.latent_size, NOPE_SIZE, Magnitudes.NORMAL) * NOPE_SIZE**-0.5
        self.up_HNK = up.bfloat16().view(s.num_heads, s.latent_size, NOPE_SIZE).to(device)
        num_blocks = self._paged.kv_N2GSD.shape[0]
        pool = torch.full((num_blocks, 2, 1, 1, s.block_size, row_size), torch.nan, dtype=torch.bfloat16)
        self.kv_N11SD = pool.to(device)[:, 1]
        self.scale = row_size**-0.5

    def _rows(self, generator: torch.Generator, length: int) -> torch.Tensor:
        width = self.shape.latent_size + self.shape.rope_size
        if self.shape.magnitudes is not Magnitudes.CANCELLING:
            return draw(generator, length, width, self.shape.magnitudes)
        # Values that cancel between spans of 512 positions show the order in which splits were folded.
        rows = draw(generator, length, width, Magnitudes.NORMAL)
        sign = 1.0 - 2.0 * (torch.arange(length) // 512 % 2)
        rows[:, : self.shape.latent_size // 2] += 30.0 * sign[:, None]
        return rows.bfloat16().float()

    def _queries(self, generator: torch.Generator, length: int, width: int) -> torch.Tensor:
        if self.shape.magnitudes is not Magnitudes.CANCELLING:
            return draw(generator, length, width, self.shape.magnitudes)
        # Nearly equal weights, or else what cancels would not.
        return draw(generator, length, width, Magnitudes.NORMAL) / 32

    def metadata(self, spans: Sequence[tuple[int, int, int]]) -> AttentionMetadata:
        """For rows start .. end of a sequence each: (sequence, start, end)."""
        return self._paged.metadata(spans)

    def store(self, ops: Ops, spans: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the rows; returns the two parts of their queries."""
        rows, queries = (
            torch.cat([each[sequence][start:end] for sequence, start, end in spans])
            for each in (self.rows, self.queries)
        )
        return ops.latent_rope_and_cache(
            queries, rows, self.kv_N11SD, self.metadata(spans), self.cos_sin_PR, self.shape.num_heads,
            self.norm_L, 1e-6,
        )  # fmt: skip

    def attend(self, ops: Ops, spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """`store`, then attention over everything stored so far: (T, H, L)."""
        q_nope, q_rope = self.store(ops, spans)
        q_latent = ops.head_linear(q_nope, ops.pack_heads(self.up_HNK))
        return ops.latent_attention(q_latent, q_rope, self.kv_N11SD, self.metadata(spans), self.scale)


def latent_probe(shape: LatentShape) -> Probe:
    """The past is stored first, then the rows attend."""

    def run(ops: Ops) -> Outputs:
        inputs = LatentInputs(shape, ops.device)
        past = [(i, 0, start) for i, (start, _) in enumerate(shape.sequences) if start > 0]
        if past:
            inputs.store(ops, past)
        attended = inputs.attend(ops, [(i, start, end) for i, (start, end) in enumerate(shape.sequences)])
        return attended, inputs.kv_N11SD

    return Probe(f"latent {shape.name}", run)


def head_linear_probe(rows: int, num_heads: int, outputs: int, inputs: int, magnitudes: Magnitudes) -> Probe:
    def run(ops: Ops) -> Outputs:
        generator = torch.Generator().manual_seed(rows + outputs)
        x = draw(generator, rows * num_heads, inputs, magnitudes).bfloat16().view(rows, num_heads, inputs)
        weight = draw(generator, num_heads * outputs, inputs, magnitudes).bfloat16().view(num_heads, outputs, inputs)
        return (ops.head_linear(x.to(ops.device), ops.pack_heads(weight.to(ops.device))),)

    return Probe(f"head_linear {rows}x{num_heads}x{outputs}x{inputs} {magnitudes.value}", run)


def grouped_route_probe(rows: int, num_experts: int, routing: GroupedRouting) -> Probe:
    """With a bias in coarse steps where scores are sigmoids, so that sums tie as well."""

    def run(ops: Ops) -> Outputs:
        logits = router_logits(rows, num_experts, seed=rows).to(ops.device)
        bias = None
        if routing.scoring == "sigmoid":
            generator = torch.Generator().manual_seed(num_experts)
            bias = (torch.randint(-4, 4, (num_experts,), generator=generator) / 8).to(ops.device)
        choice = ops.moe_route_grouped(logits, bias, routing)
        return choice.experts_TJ, choice.weights_TJ

    return Probe(f"moe_route_grouped {rows}x{num_experts} {routing}", run)
