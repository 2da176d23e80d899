"""The operations as calls into the native library (`csrc/`). Tensors in, pointers through, tensors out.

A call costs 2 to 4 microseconds of Python; shapes and dtypes are asserted, because the library trusts
what it is given.
"""

from __future__ import annotations

import torch

from cluster.engine.kernels.cpu.arithmetic import GROUP, LANES, InstructionClass
from cluster.engine.kernels.cpu.latent import LatentLoop
from cluster.engine.kernels.cpu.library import Functions
from cluster.engine.kernels.cpu.moe import ExpertLoop
from cluster.engine.kernels.ops import AttentionMetadata, LinearWeight, TwoStepAttention

_BF16, _F32 = torch.bfloat16, torch.float32
MAX_HEAD_SIZE = 256
_NO_WINDOW = 1 << 40  # longer than any context


class PackedWeight:
    """Column tiles of 16 outputs, each [groups of 32 k][16 pairs of k][16 outputs][2], zero padded."""

    __slots__ = ("in_features", "num_bytes", "out_features", "packed", "pointer")

    def __init__(self, packed: torch.Tensor, out_features: int, in_features: int) -> None:
        self.packed = packed  # keeps the memory alive
        self.pointer = packed.data_ptr()
        self.out_features = out_features
        self.in_features = in_features
        self.num_bytes = packed.nbytes

    def rows(self, indices_T: torch.Tensor) -> torch.Tensor:
        tiles_TGPX = self.packed[indices_T // LANES, :, :, indices_T % LANES]
        return tiles_TGPX.flatten(1)[:, : self.in_features]


class NativeOps(ExpertLoop, LatentLoop, TwoStepAttention):
    """`Ops` by one variant of one instruction class."""

    residual_dtype = torch.float32

    def __init__(self, functions: Functions, instructions: InstructionClass, num_threads: int) -> None:
        self.name = f"cpu:{instructions.value}"
        self.device = torch.device("cpu")
        self.num_threads = num_threads
        self._pack = functions.pack
        self._linear = functions.linear
        self._silu_mul = functions.silu_mul
        self._embedding = functions.embedding
        self._rms_norm = functions.rms_norm
        self._add_rms_norm = functions.add_rms_norm
        self._rope_and_cache = functions.rope_and_cache
        self._attention = functions.attention
        self._log_softmax_stats = functions.log_softmax_stats
        self._softmax = functions.softmax
        self._argmax = functions.argmax
        self._combine = functions.combine

    def pack_linear(self, weight_NK: torch.Tensor) -> PackedWeight:
        out_features, in_features = weight_NK.shape
        weight_NK = weight_NK.to(_BF16)
        if weight_NK.stride(1) != 1:
            weight_NK = weight_NK.contiguous()
        tiles, groups = -(-out_features // LANES), -(-in_features // GROUP)
        packed = torch.empty((tiles, groups, GROUP // 2, LANES, 2), dtype=_BF16)
        self._pack(
            weight_NK.data_ptr(), weight_NK.stride(0), out_features, in_features, packed.data_ptr(), self.num_threads
        )
        return PackedWeight(packed, out_features, in_features)

    def pack_fp8(self, values_NK: torch.Tensor, scale: torch.Tensor) -> LinearWeight:
        raise NotImplementedError("FP8 layers are CpuFp8Ops' business")

    def linear(
        self,
        x_TK: torch.Tensor,
        weight: LinearWeight,
        bias_N: torch.Tensor | None = None,
        *,
        out_dtype: torch.dtype = _BF16,
    ) -> torch.Tensor:
        assert isinstance(weight, PackedWeight)
        num_rows, num_columns = x_TK.shape[0], weight.out_features
        _check(x_TK, _BF16, weight.in_features)
        out = torch.empty((num_rows, num_columns), dtype=out_dtype)
        bias_pointer = bias_is_float = 0
        if bias_N is not None:
            bias_pointer, bias_is_float = bias_N.data_ptr(), _is_float(bias_N, num_columns)
        self._linear(
            x_TK.data_ptr(),
            num_rows,
            weight.in_features,
            weight.pointer,
            num_columns,
            bias_pointer,
            bias_is_float,
            out.data_ptr(),
            _is_float(out, num_columns),
            0,
            self.num_threads,
        )
        return out

    def linear_silu_mul(
        self, x_TK: torch.Tensor, gate_up: LinearWeight, *, input_of: LinearWeight | None = None
    ) -> torch.Tensor:
        assert isinstance(gate_up, PackedWeight)
        num_rows, num_columns = x_TK.shape[0], gate_up.out_features // 2
        _check(x_TK, _BF16, gate_up.in_features)
        out = torch.empty((num_rows, num_columns), dtype=_BF16)
        if num_columns % LANES:  # gate and up tiles do not line up
            both = self.linear(x_TK, gate_up, out_dtype=_F32)
            self._silu_mul(both.data_ptr(), num_rows, num_columns, out.data_ptr(), self.num_threads)
            return out
        self._linear(
            x_TK.data_ptr(), num_rows, gate_up.in_features, gate_up.pointer, gate_up.out_features, 0, 0, out.data_ptr(),
            0, 1, self.num_threads,
        )  # fmt: skip
        return out

    def embedding(self, token_ids_T: torch.Tensor, table_VK: torch.Tensor) -> torch.Tensor:
        num_rows, width = token_ids_T.shape[0], table_VK.shape[1]
        _check(table_VK, _BF16, width)
        assert token_ids_T.dtype == torch.int64
        assert token_ids_T.is_contiguous()
        out = torch.empty((num_rows, width), dtype=_F32)
        self._embedding(token_ids_T.data_ptr(), table_VK.data_ptr(), num_rows, width, out.data_ptr(), self.num_threads)
        return out

    def rms_norm(
        self,
        x_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        num_rows, width = x_TK.shape
        out = torch.empty((num_rows, width), dtype=out_dtype)
        self._rms_norm(
            x_TK.data_ptr(),
            _is_float(x_TK, width),
            weight_K.data_ptr(),
            _is_float(weight_K, width),
            eps,
            num_rows,
            width,
            out.data_ptr(),
            _is_float(out, width),
            self.num_threads,
        )
        return out

    def add_rms_norm(
        self,
        residual_TK: torch.Tensor,
        update_TK: torch.Tensor,
        weight_K: torch.Tensor,
        eps: float,
        *,
        input_of: LinearWeight | None = None,
    ) -> torch.Tensor:
        num_rows, width = residual_TK.shape
        _check(residual_TK, _F32, width)
        assert update_TK.shape == residual_TK.shape
        out = torch.empty((num_rows, width), dtype=_BF16)
        self._add_rms_norm(
            residual_TK.data_ptr(),
            update_TK.data_ptr(),
            _is_float(update_TK, width),
            weight_K.data_ptr(),
            _is_float(weight_K, width),
            eps,
            num_rows,
            width,
            out.data_ptr(),
            self.num_threads,
        )
        return out

    def rope_and_cache(
        self,
        qkv_TC: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        cos_sin_PD: torch.Tensor,
        num_heads: int,
        q_norm_D: torch.Tensor | None = None,
        k_norm_D: torch.Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> torch.Tensor:
        num_rows = qkv_TC.shape[0]
        num_kv_heads, block_size, head_size = kv_N2GSD.shape[2:]
        _check(qkv_TC, _F32, (num_heads + 2 * num_kv_heads) * head_size)
        _check(cos_sin_PD, _F32, head_size)
        assert kv_N2GSD.dtype == _BF16
        assert head_size <= MAX_HEAD_SIZE
        assert head_size % 2 == 0
        assert (q_norm_D is None) == (k_norm_D is None)
        norms_are_float = 0
        if q_norm_D is not None and k_norm_D is not None:
            norms_are_float = _is_float(q_norm_D, head_size)
            assert norms_are_float == _is_float(k_norm_D, head_size)
        q_THD = torch.empty((num_rows, num_heads, head_size), dtype=_BF16)
        self._rope_and_cache(
            qkv_TC.data_ptr(),
            kv_N2GSD.data_ptr(),
            *_cache_strides(kv_N2GSD),
            metadata.slot_mapping.data_ptr(),
            metadata.positions.data_ptr(),
            cos_sin_PD.data_ptr(),
            0 if q_norm_D is None else q_norm_D.data_ptr(),
            0 if k_norm_D is None else k_norm_D.data_ptr(),
            norms_are_float,
            norm_eps,
            num_rows,
            num_heads,
            num_kv_heads,
            head_size,
            block_size,
            q_THD.data_ptr(),
            self.num_threads,
        )
        return q_THD

    def attention(
        self,
        q_THD: torch.Tensor,
        kv_N2GSD: torch.Tensor,
        metadata: AttentionMetadata,
        scale: float,
        *,
        window: int | None = None,
    ) -> torch.Tensor:
        num_rows, num_heads, head_size = q_THD.shape
        num_kv_heads, block_size = kv_N2GSD.shape[2:4]
        _check(q_THD, _BF16, head_size)
        assert kv_N2GSD.dtype == _BF16
        assert block_size % 16 == 0
        assert head_size % 16 == 0
        assert head_size <= MAX_HEAD_SIZE
        assert num_heads % num_kv_heads == 0
        assert scale > 0
        assert window is None or window > 0
        block_table = metadata.block_table
        assert block_table.stride(1) == 1 or block_table.shape[1] == 1
        out = torch.zeros((num_rows, num_heads * head_size), dtype=_BF16)  # padding rows stay 0
        self._attention(
            q_THD.data_ptr(),
            kv_N2GSD.data_ptr(),
            *_cache_strides(kv_N2GSD),
            metadata.query_start.data_ptr(),
            metadata.context_len.data_ptr(),
            block_table.data_ptr(),
            block_table.stride(0),
            metadata.context_len.shape[0],
            num_heads,
            num_kv_heads,
            head_size,
            block_size,
            _NO_WINDOW if window is None else window,
            scale,
            out.data_ptr(),
            self.num_threads,
        )
        return out

    def log_softmax_stats(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows, vocab_size, stride = _logits(logits_TV)
        best, log_sum = torch.empty(num_rows, dtype=_F32), torch.empty(num_rows, dtype=_F32)
        self._log_softmax_stats(
            logits_TV.data_ptr(), stride, num_rows, vocab_size, best.data_ptr(), log_sum.data_ptr(), self.num_threads
        )
        return best, log_sum

    def softmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        num_rows, vocab_size, stride = _logits(logits_TV)
        out = torch.empty((num_rows, vocab_size), dtype=_F32)
        self._softmax(logits_TV.data_ptr(), stride, num_rows, vocab_size, out.data_ptr(), self.num_threads)
        return out

    def argmax(self, logits_TV: torch.Tensor) -> torch.Tensor:
        num_rows, vocab_size, stride = _logits(logits_TV)
        out = torch.empty(num_rows, dtype=torch.int64)
        self._argmax(logits_TV.data_ptr(), stride, num_rows, vocab_size, out.data_ptr(), self.num_threads)
        return out

    def moe_combine(self, rows_TJK: torch.Tensor, weights_TJ: torch.Tensor) -> torch.Tensor:
        num_rows, top_k, width = rows_TJK.shape
        _check(rows_TJK, _F32, width)
        _check(weights_TJ, _F32, top_k)
        out = torch.empty((num_rows, width), dtype=_F32)
        self._combine(
            rows_TJK.data_ptr(), weights_TJ.data_ptr(), num_rows, top_k, width, out.data_ptr(), self.num_threads
        )
        return out


def _check(tensor: torch.Tensor, dtype: torch.dtype, width: int) -> None:
    assert tensor.dtype == dtype, f"expected {dtype}, got {tensor.dtype}"
    assert tensor.shape[-1] == width, f"expected rows of {width}, got {tuple(tensor.shape)}"
    assert tensor.is_contiguous()


def _is_float(tensor: torch.Tensor, width: int) -> int:
    """1 for float32, 0 for bfloat16; nothing else may come here."""
    is_float = tensor.dtype == _F32
    _check(tensor, _F32 if is_float else _BF16, width)
    return int(is_float)


def _cache_strides(kv_N2GSD: torch.Tensor) -> tuple[int, ...]:
    *strides, element_stride = kv_N2GSD.stride()
    assert element_stride == 1
    return tuple(strides)


def _logits(logits_TV: torch.Tensor) -> tuple[int, int, int]:
    assert logits_TV.dtype == _F32
    assert logits_TV.stride(1) == 1 or logits_TV.shape[1] == 1
    return logits_TV.shape[0], logits_TV.shape[1], logits_TV.stride(0)
