"""Our engine with the products and the prefill attention that torch gives by default: what invariance costs.

Bits change with the batch here. In a process of its own: torch's switches for cuBLAS hold for all of it.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.attention import sdpa_ms
from benchmarks.gpu.engine import EngineBench
from benchmarks.gpu.figures import recorded_figures
from benchmarks.gpu.gemm import run_silu_mul, use_default_cublas
from benchmarks.gpu.random_model import LLAMA_8B, random_decoder
from benchmarks.gpu.record_engine import BATCHES, PEER_PREFILL, appender
from cluster.engine.batch import Batch
from cluster.engine.gpu.runner import GpuModelRunner, LaunchedGpuStep
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.kernels.cuda_weights import CudaLinearWeight
from cluster.engine.kernels.ops import AttentionMetadata, LinearWeight


class TorchDefaultOps(CudaOps):
    """cuBLAS as torch sets it up, split-K and all; its fastest attention where a step is fresh prompts only.

    Norms, rotary embedding, decode attention and the vocabulary's statistics are ours: torch has nothing faster.
    SwiGLU is one kernel behind its product, not torch's two.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        use_default_cublas()
        times = {name: ms for name, ms in sdpa_ms(4, 2048).items() if name in SDPBackend.__members__}
        self.backend_name = min(times, key=lambda name: times[name])
        self.lm_head: LinearWeight | None = None  # whose results must be fp32
        self.fresh_lengths: tuple[int, ...] | None = None  # of the step's prompts, if it has nothing else

    def linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        """bf16 but for the logits: the rotary kernel takes bf16, too, and it is half of the traffic."""
        assert isinstance(weight, CudaLinearWeight)
        assert bias_N is None
        if weight is self.lm_head:
            return torch.mm(x_TK, weight.weight_NK.t(), out_dtype=torch.float32)
        return torch.nn.functional.linear(x_TK, weight.weight_NK)

    def linear_silu_mul(
        self, x_TK: torch.Tensor, gate_up: LinearWeight, *, input_of: LinearWeight | None = None
    ) -> torch.Tensor:
        wide_TF = self.linear(x_TK, gate_up)
        out_TF = torch.empty((len(x_TK), gate_up.out_features // 2), dtype=wide_TF.dtype, device=wide_TF.device)
        run_silu_mul(wide_TF, out_TF)
        return out_TF

    def attention(
        self,
        q_THD: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        if self.fresh_lengths is None or window is not None:
            return super().attention(q_THD, kv_N2GSD, metadata, scale, window=window)
        with sdpa_kernel(SDPBackend.__members__[self.backend_name]):
            return fresh_attention(q_THD, kv_N2GSD, metadata.block_table, self.fresh_lengths, scale)


def fresh_attention(
    q_THD: torch.Tensor,
    kv_N2GSD: torch.Tensor,
    block_table_BM: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
) -> torch.Tensor:
    """(T, H * D): causal attention of whole prompts by torch, neighbours of one length as one batch. K and V are
    gathered from their blocks. Rows behind the last prompt are padding and keep what they had."""
    num_rows = len(q_THD)
    block_size = kv_N2GSD.shape[3]
    out = torch.empty((num_rows, q_THD[0].numel()), dtype=q_THD.dtype, device=q_THD.device)
    first_row = first_sequence = 0
    for length, group in groupby(lengths):
        count = len(list(group))
        rows = slice(first_row, first_row + count * length)
        blocks = block_table_BM[first_sequence : first_sequence + count, : -(-length // block_size)]
        kv = kv_N2GSD.index_select(0, blocks.flatten()).unflatten(0, blocks.shape)
        k, v = kv.permute(2, 0, 1, 4, 3, 5).flatten(2, 3)[:, :, :length].transpose(2, 3)
        q = q_THD[rows].unflatten(0, (count, length)).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(1, 2)
        if rows == slice(0, num_rows):
            return attended.reshape(out.shape)
        out[rows] = attended.reshape(count * length, -1)
        first_row, first_sequence = rows.stop, first_sequence + count
    return out


def fresh_lengths(batch: Batch) -> tuple[int, ...] | None:
    """Rows of each prompt, if nothing in the step reads keys of an earlier one."""
    if batch.age > 0 or any(entry.start for entry in batch.scheduled):
        return None
    return tuple(entry.num_tokens for entry in batch.scheduled)


def make_default_bench() -> EngineBench:
    ops = TorchDefaultOps(torch.device("cuda"))
    model = random_decoder(LLAMA_8B, ops)
    ops.lm_head = model.weights.lm_head
    bench = EngineBench(model, ops)
    runner = bench.engine._runner
    assert isinstance(runner, GpuModelRunner)
    plain = runner.launch

    def launch(batch: Batch) -> LaunchedGpuStep:
        ops.fresh_lengths = fresh_lengths(batch)
        return plain(batch)

    runner.launch = launch  # type: ignore[method-assign]
    return bench


def record_torch_defaults(out: Path, ours_file: Path) -> None:
    """`engine_8b`, `ratio_vs_torch_defaults`: our speed over that of torch's defaults, above 1 is faster."""
    append = appender("engine_8b", out)
    ours = recorded_figures(ours_file, torch.cuda.get_device_name())
    bench = make_default_bench()
    count, length = PEER_PREFILL
    prefill = bench.prefill_tokens_per_s(count, length)
    print(f"torch's defaults: {prefill:.0f} tok/s", flush=True)
    if ours.prefill_tok_s is not None:
        params = {"what": "prefill", "batch": count, "tokens": length, "torch_tok_s": prefill}
        append("ratio_vs_torch_defaults", ours.prefill_tok_s / prefill, "x", params)
    for batch in BATCHES:
        milliseconds = bench.decode_ms(batch)
        print(f"torch's defaults: {milliseconds:.3f} ms at batch {batch}", flush=True)
        if batch in ours.decode_ms:
            params = {"what": "decode", "batch": batch, "torch_ms": milliseconds}
            append("ratio_vs_torch_defaults", milliseconds / ours.decode_ms[batch], "x", params)
