"""Row statistics of the logits: maximum, logsumexp and the lowest id of the maximum.

The vocabulary is cut into fixed chunks counted from id 0; each chunk gives its maximum, the sum of
exponentials relative to it and its first id, and a second kernel joins the chunks of a row in a
fixed order. One row thus spreads over many multiprocessors, and no bit depends on the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cluster.engine.kernels.triton.overlap import begin


@triton.jit
def chunk_stats_kernel(
    logits_ptr, chunk_max_ptr, chunk_sum_ptr, chunk_id_ptr, stride_row, V, num_chunks,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    begin(PDL)
    row = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    offs = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * stride_row + offs, mask=offs < V, other=float("-inf"))
    numbers = tl.where(logits != logits, float("-inf"), logits)  # NaN takes no part in the maximum
    maximum = tl.max(numbers, axis=0)
    first = tl.min(tl.where(numbers == maximum, offs, V), axis=0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(tl.exp(logits - shift), axis=0)
    place = row * num_chunks + chunk
    tl.store(chunk_max_ptr + place, maximum)
    tl.store(chunk_sum_ptr + place, total)
    tl.store(chunk_id_ptr + place, first)


@triton.jit
def fold_stats_kernel(
    chunk_max_ptr,
    chunk_sum_ptr,
    chunk_id_ptr,
    max_ptr,
    logsumexp_ptr,
    argmax_ptr,
    num_chunks,
    V,
    BLOCK_CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A NaN logit makes its chunk's sum NaN, and so the row's logsumexp. The id is always a valid one."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_CHUNKS)
    keep = offs < num_chunks
    place = row * num_chunks + offs
    maxima = tl.load(chunk_max_ptr + place, mask=keep, other=float("-inf"))
    totals = tl.load(chunk_sum_ptr + place, mask=keep, other=0.0)
    ids = tl.load(chunk_id_ptr + place, mask=keep, other=2147483647)
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(totals * tl.exp(maxima - maximum), axis=0)
    tl.store(max_ptr + row, maximum)
    tl.store(logsumexp_ptr + row, maximum + tl.log(total))
    first = tl.min(tl.where(maxima == maximum, ids, V - 1), axis=0)
    tl.store(argmax_ptr + row, tl.minimum(first, V - 1).to(tl.int64))
