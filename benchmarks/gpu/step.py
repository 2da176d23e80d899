"""One decode step of an 8B-shaped Llama, all operations in one CUDA graph: where the time of a token goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.gpu.attention import paged_inputs
from benchmarks.gpu.timing import graph_ms
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.fp8 import quantize_weight
from cluster.engine.kernels.ops import AttentionMetadata, LinearWeight, Rotation

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_SIZE, FFN, VOCABULARY = 32, 4096, 32, 8, 128, 14336, 128256


class _Layer(NamedTuple):
    qkv: LinearWeight
    o: LinearWeight
    gate_up: LinearWeight
    down: LinearWeight
    norm_K: torch.Tensor


class DecodeStep:
    """Random weights of the 8B shape (15 GB, 8 GB with FP8 layers) and everything a step reads but its batch."""

    def __init__(self, ops: CudaOps, *, has_fp8: bool = False) -> None:
        self.ops, self.has_fp8 = ops, has_fp8
        self.layers = [self._layer() for _ in range(LAYERS)]
        self.lm_head = ops.pack_linear(self._random(VOCABULARY, WIDTH))
        self.embedding = torch.randn((VOCABULARY, WIDTH), device="cuda", dtype=torch.bfloat16)
        angles = torch.arange(40000, device="cuda")[:, None] * 5e5 ** (-torch.arange(64, device="cuda") / 64)
        self.cos_sin_PD = torch.cat([angles.cos(), angles.sin()], dim=1)

    def _random(self, n: int, k: int) -> torch.Tensor:
        weight_NK: torch.Tensor = torch.randn((n, k), device="cuda", dtype=torch.bfloat16) * k**-0.5
        return weight_NK

    def _weight(self, n: int, k: int) -> LinearWeight:
        weight_NK = self._random(n, k)
        return self.ops.pack_fp8(*quantize_weight(weight_NK)) if self.has_fp8 else self.ops.pack_linear(weight_NK)

    def _layer(self) -> _Layer:
        return _Layer(
            self._weight((HEADS + 2 * KV_HEADS) * HEAD_SIZE, WIDTH),
            self._weight(WIDTH, HEADS * HEAD_SIZE),
            self._weight(2 * FFN, WIDTH),
            self._weight(WIDTH, FFN),
            torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16),
        )

    @property
    def weight_bytes(self) -> int:
        per_layer = sum(w.num_bytes for w in self.layers[0][:4])
        return LAYERS * per_layer + self.lm_head.num_bytes

    def run(self, token_ids: torch.Tensor, kv: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        """Next token ids, greedy, with each row's logsumexp computed too."""
        ops = self.ops
        metadata = replace(metadata)  # of this step: lists of work that an earlier one left are not a graph's to read
        residual = ops.embedding(token_ids, self.embedding)
        x = ops.rms_norm(residual, self.layers[0].norm_K, 1e-5, input_of=self.layers[0].qkv)
        for index, layer in enumerate(self.layers):
            qkv = ops.linear(x, layer.qkv, out_dtype=torch.float32)
            rotation = Rotation(self.cos_sin_PD, HEADS)
            mixed = ops.rope_attention(qkv, kv[:, index], metadata, rotation, HEAD_SIZE**-0.5)
            update = ops.linear(mixed, layer.o, out_dtype=ops.residual_dtype)
            x = ops.add_rms_norm(residual, update, layer.norm_K, 1e-5, input_of=layer.gate_up)
            active = ops.linear_silu_mul(x, layer.gate_up, input_of=layer.down)
            update = ops.linear(active, layer.down, out_dtype=ops.residual_dtype)
            reader = self.layers[index + 1].qkv if index + 1 < LAYERS else self.lm_head
            x = ops.add_rms_norm(residual, update, layer.norm_K, 1e-5, input_of=reader)
        logits = ops.linear(x, self.lm_head, out_dtype=torch.float32)
        ops.log_softmax_stats(logits)
        return ops.argmax(logits)

    def gemms(self, x: torch.Tensor) -> None:
        """The weights' part alone."""
        ops = self.ops
        wide = torch.empty((x.shape[0], FFN), device="cuda", dtype=torch.bfloat16)
        for layer in self.layers:
            ops.linear(x, layer.qkv, out_dtype=torch.float32)
            ops.linear(x, layer.o, out_dtype=ops.residual_dtype)
            ops.linear_silu_mul(x, layer.gate_up)
            ops.linear(wide, layer.down, out_dtype=ops.residual_dtype)
        ops.linear(x, self.lm_head, out_dtype=torch.float32)


def decode_batch(batch: int, context: int) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Token ids, the cache of all layers, and metadata of one new token per sequence."""
    _, kv, metadata = paged_inputs([1] * batch, [context] * batch, num_layers=LAYERS)
    kv = torch.nan_to_num(kv)
    last = metadata.block_table[:, (context - 1) // 64].long() * 64 + (context - 1) % 64
    filled = AttentionMetadata(
        metadata.query_start, metadata.context_len, metadata.block_table, last, metadata.positions, 1, context
    )
    return torch.randint(0, VOCABULARY, (batch,), device="cuda"), kv, filled


def step_ms(step: DecodeStep, batch: int, context: int) -> tuple[float, float]:
    """Milliseconds of the whole step and of its GEMMs, each as one graph."""
    token_ids, kv, metadata = decode_batch(batch, context)
    x = torch.randn((batch, WIDTH), device="cuda", dtype=torch.bfloat16)
    whole: Callable[[], object] = lambda: step.run(token_ids, kv, metadata)  # noqa: E731
    return graph_ms([whole], min_ms=20), graph_ms([lambda: step.gemms(x)], min_ms=20)
