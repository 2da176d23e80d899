"""Seeded runs of every operation: what admission compares and what the fingerprint hashes.

The inputs are made to show a change of order: values of a wide range of exponents, sums that cancel,
denormals, odd shapes, contexts across split boundaries, caches whose unused memory holds NaN.
Device-neutral: a probe sees an `Ops` and makes its inputs on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from cluster.engine.kernels.ops import AttentionMetadata, Ops, Rotation
from cluster.engine.kernels.registry import describe_difference
from cluster.engine.trigonometry import cos_sin, powers

Outputs = tuple[torch.Tensor, ...]


class Magnitudes(Enum):
    NORMAL = "normal"
    WIDE = "wide"  # exponents -20 .. 20
    CANCELLING = "cancelling"  # large values of opposite signs, far apart in the sum
    DENORMAL = "denormal"  # products around the smallest normal number


def draw(generator: torch.Generator, rows: int, columns: int, magnitudes: Magnitudes) -> torch.Tensor:
    """(rows, columns) float32 values that bf16 represents."""
    values = torch.randn((rows, columns), generator=generator)
    match magnitudes:
        case Magnitudes.WIDE:
            values = values * torch.randint(-20, 20, values.shape, generator=generator).exp2()
        case Magnitudes.CANCELLING:
            half = columns // 2
            values[:, :half] *= 1024.0
            values[:, half : 2 * half] = -values[:, :half].flip(1) * (1 + 1 / 64)
        case Magnitudes.DENORMAL:
            values = values * torch.randint(-70, -55, values.shape, generator=generator).exp2()
        case Magnitudes.NORMAL:
            pass
    return values.bfloat16().float()


@dataclass(frozen=True, slots=True)
class Probe:
    """One run of one operation."""

    name: str
    run: Callable[[Ops], Outputs]


@dataclass(frozen=True, slots=True)
class EqualsReference:
    """An admission case: the candidate's outputs are the reference's."""

    probe: Probe

    @property
    def name(self) -> str:
        return self.probe.name

    def difference(self, candidate: Ops, reference: Ops) -> str | None:
        return first_difference(self.probe.run(candidate), self.probe.run(reference))


@dataclass(frozen=True, slots=True)
class EqualsItself:
    """An admission case for shapes too large for a reference: two ways to one result.

    Necessary, not sufficient: it stands beside cases that compare with the reference.
    """

    name: str
    one_way: Callable[[Ops], Outputs]
    other_way: Callable[[Ops], Outputs]

    def difference(self, candidate: Ops, reference: Ops) -> str | None:
        return first_difference(self.one_way(candidate), self.other_way(candidate))


def first_difference(ours: Outputs, theirs: Outputs) -> str | None:
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        difference = describe_difference(a.cpu(), b.cpu())
        if difference is not None:
            return difference if len(ours) == 1 else f"output {index}: {difference}"
    return None


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear_probe(rows: int, outputs: int, inputs: int, magnitudes: Magnitudes) -> Probe:
    """Both dtypes of `linear`, one with a bias."""

    def run(ops: Ops) -> Outputs:
        generator = _generator(rows + outputs + inputs)
        x = draw(generator, rows, inputs, magnitudes).bfloat16().to(ops.device)
        weight = ops.pack_linear(draw(generator, outputs, inputs, magnitudes).bfloat16().to(ops.device))
        bias = torch.randn(outputs, generator=generator).bfloat16().to(ops.device)
        return ops.linear(x, weight, out_dtype=torch.float32), ops.linear(x, weight, bias)

    return Probe(f"linear {rows}x{outputs}x{inputs} {magnitudes.value}", run)


def silu_probe(rows: int, features: int, inputs: int, magnitudes: Magnitudes) -> Probe:
    def run(ops: Ops) -> Outputs:
        generator = _generator(rows + features + inputs)
        x = draw(generator, rows, inputs, magnitudes).bfloat16().to(ops.device)
        weight = draw(generator, 2 * features, inputs, magnitudes) * inputs**-0.5
        return (ops.linear_silu_mul(x, ops.pack_linear(weight.bfloat16().to(ops.device))),)

    return Probe(f"linear_silu_mul {rows}x{features}x{inputs} {magnitudes.value}", run)


def linear_rows_case(rows: int, outputs: int, inputs: int) -> EqualsItself:
    """Many rows at once against one by one, and against shards of the columns."""

    def operands(ops: Ops) -> tuple[torch.Tensor, torch.Tensor]:
        generator = _generator(rows)
        x = draw(generator, rows, inputs, Magnitudes.NORMAL).bfloat16().to(ops.device)
        return x, draw(generator, outputs, inputs, Magnitudes.NORMAL).bfloat16().to(ops.device)

    def at_once(ops: Ops) -> Outputs:
        x, weight = operands(ops)
        return (ops.linear(x, ops.pack_linear(weight)),)

    def one_by_one(ops: Ops) -> Outputs:
        x, weight = operands(ops)
        shards = [ops.pack_linear(shard) for shard in torch.tensor_split(weight, 3)]
        rows_of = [torch.cat([ops.linear(row[None], shard) for shard in shards], dim=1) for row in x]
        return (torch.cat(rows_of),)

    return EqualsItself(f"linear {rows}x{outputs}x{inputs} at once, one by one", at_once, one_by_one)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Geometry and content of an attention probe. Rows are positions start .. end of each sequence."""

    head_size: int
    num_heads: int
    num_kv_heads: int
    block_size: int
    sequences: Sequence[tuple[int, int]]
    magnitudes: Magnitudes = Magnitudes.NORMAL
    has_norms: bool = False
    window: int | None = None


@functools.cache
def _cos_sin_PD(head_size: int) -> torch.Tensor:
    """For 4,096 positions. Many probes have one head size; nobody writes into it."""
    half = head_size // 2
    frequencies = powers(10000.0, [(-index, max(half - 1, 1)) for index in range(half)])
    angles = torch.arange(4096.0, dtype=torch.float64)[:, None] * frequencies
    return torch.cat(cos_sin(angles), dim=1).float()


class PagedInputs:
    """A cache with holes, its block tables, and the rows of some sequences, for one `CacheShape`.

    All memory that no token was stored in is NaN.
    """

    def __init__(self, shape: CacheShape, device: torch.device, seed: int = 0) -> None:
        self.shape = shape
        self.device = device
        generator = _generator(seed)
        s = shape
        blocks_each = -(-max(end for _, end in s.sequences) // s.block_size)
        num_blocks = blocks_each * len(s.sequences) + 3
        order = torch.randperm(num_blocks, generator=generator)[: blocks_each * len(s.sequences)]
        self.block_table = order.view(len(s.sequences), blocks_each).int()
        pool = torch.full((num_blocks, 2, 2, s.num_kv_heads, s.block_size, s.head_size), torch.nan)
        self.kv_N2GSD = pool.bfloat16().to(device)[:, 1]
        self.width = (s.num_heads + 2 * s.num_kv_heads) * s.head_size
        self.qkv_of_sequence = [self._rows(generator, end).to(device) for _, end in s.sequences]
        self.cos_sin_PD = _cos_sin_PD(s.head_size).to(device)
        self.norms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if s.has_norms:
            q_norm, k_norm = torch.rand((2, s.head_size), generator=generator).add(0.5).bfloat16().to(device)
            self.norms = (q_norm, k_norm)

    def _rows(self, generator: torch.Generator, length: int) -> torch.Tensor:
        s = self.shape
        if s.magnitudes != Magnitudes.CANCELLING:
            return draw(generator, length, self.width, s.magnitudes)
        # Nearly equal weights, and values whose large parts cancel between spans of 512 positions: else
        # the one rounding to bf16 at the end hides the order in which splits were folded.
        rows = draw(generator, length, self.width, Magnitudes.NORMAL)
        rows[:, : -s.num_kv_heads * s.head_size] *= 1 / 32
        sign = 1.0 - 2.0 * (torch.arange(length) // 512 % 2)
        rows[:, -s.num_kv_heads * s.head_size :] += 1000.0 * sign[:, None]
        return rows.bfloat16().float()

    def metadata(self, spans: Sequence[tuple[int, int, int]]) -> AttentionMetadata:
        """For rows start .. end of a sequence each: (sequence, start, end)."""
        size = self.shape.block_size
        positions = [torch.arange(start, end) for _, start, end in spans]
        tables = self.block_table[[sequence for sequence, _, _ in spans]]
        slots = [table.long()[p // size] * size + p % size for table, p in zip(tables, positions, strict=True)]
        counts = torch.tensor([0] + [end - start for _, start, end in spans])
        return AttentionMetadata(
            query_start=counts.cumsum(0).int().to(self.device),
            context_len=torch.tensor([end for _, _, end in spans], dtype=torch.int32, device=self.device),
            block_table=tables.to(self.device),
            slot_mapping=torch.cat(slots).to(self.device),
            positions=torch.cat(positions).to(self.device),
            num_rows_max=int(counts.max()),
            context_len_max=max(end for _, _, end in spans),
        )

    def store(self, ops: Ops, spans: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, AttentionMetadata]:
        """Rotate and store the rows; returns their queries."""
        metadata = self.metadata(spans)
        return ops.rope_and_cache(self._qkv(spans), self.kv_N2GSD, metadata, *self._rotation), metadata

    def attend(self, ops: Ops, spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """Rotate and store the rows, then attention over everything stored so far, as a model asks for it."""
        scale = self.shape.head_size**-0.5
        return ops.rope_attention(
            self._qkv(spans), self.kv_N2GSD, self.metadata(spans), self._rotation, scale, window=self.shape.window
        )

    def _qkv(self, spans: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        return torch.cat([self.qkv_of_sequence[sequence][start:end] for sequence, start, end in spans])

    @property
    def _rotation(self) -> Rotation:
        return Rotation(self.cos_sin_PD, self.shape.num_heads, *self.norms, 1e-6)


def attention_probe(shape: CacheShape) -> Probe:
    """The past is stored first, then the rows attend."""

    def run(ops: Ops) -> Outputs:
        inputs = PagedInputs(shape, ops.device)
        past = [(i, 0, start) for i, (start, _) in enumerate(shape.sequences) if start > 0]
        if past:
            inputs.store(ops, past)
        return (inputs.attend(ops, [(i, start, end) for i, (start, end) in enumerate(shape.sequences)]),)

    return Probe(f"attention {_describe(shape)}", run)


def rope_probe(shape: CacheShape) -> Probe:
    def run(ops: Ops) -> Outputs:
        inputs = PagedInputs(shape, ops.device)
        q, _ = inputs.store(ops, [(i, start, end) for i, (start, end) in enumerate(shape.sequences)])
        return q, inputs.kv_N2GSD

    return Probe(f"rope_and_cache {_describe(shape)}", run)


def _describe(shape: CacheShape) -> str:
    spans = ",".join(f"{start}-{end}" for start, end in shape.sequences)
    window = f" window {shape.window}" if shape.window else ""
    return f"D{shape.head_size} {shape.num_heads}/{shape.num_kv_heads} rows {spans} {shape.magnitudes.value}{window}"


def norm_probe(rows: int, width: int, magnitudes: Magnitudes) -> Probe:
    def run(ops: Ops) -> Outputs:
        generator = _generator(rows + width)
        residual = draw(generator, rows, width, magnitudes).to(ops.residual_dtype).to(ops.device)
        update = draw(generator, rows, width, magnitudes).bfloat16().to(ops.device)
        weight = torch.rand(width, generator=generator).bfloat16().to(ops.device)
        plain = ops.rms_norm(residual, weight, 1e-5)
        wide = ops.rms_norm(residual, weight, 1e-5, out_dtype=torch.float32)
        return plain, wide, ops.add_rms_norm(residual, update, weight, 1e-5), residual

    return Probe(f"rms_norm {rows}x{width} {magnitudes.value}", run)


def embedding_probe(rows: int, width: int) -> Probe:
    def run(ops: Ops) -> Outputs:
        generator = _generator(rows)
        table = draw(generator, 50, width, Magnitudes.WIDE).bfloat16().to(ops.device)
        return (ops.embedding(torch.randint(50, (rows,), generator=generator).to(ops.device), table),)

    return Probe(f"embedding {rows}x{width}", run)


def softmax_probe(rows: int, vocab_size: int) -> Probe:
    """Rows of ordinary logits, then one of equal ones, one with most masked, one all masked, one with NaN."""

    def run(ops: Ops) -> Outputs:
        generator = _generator(rows)
        logits = torch.randn((rows + 4, vocab_size), generator=generator) * 8
        logits[rows] = 1.5
        logits[rows + 1, 1:] = -torch.inf
        logits[rows + 2] = -torch.inf
        logits[rows + 3, vocab_size // 2] = torch.nan
        logits = logits.to(ops.device)
        return *ops.log_softmax_stats(logits), ops.softmax(logits), ops.argmax(logits)

    return Probe(f"softmax {rows}x{vocab_size}", run)
