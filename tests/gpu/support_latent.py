"""Inputs of latent attention for the kernel tests."""

from __future__ import annotations

import torch

from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kernels.triton import latent_launch
from cluster.engine.kernels.triton.plans import LatentPlan
from tests.gpu.support import NUM_MULTIPROCESSORS


class PagedLatent:
    """Sequences in a shuffled paged cache whose unused slots hold NaN, with all their rows' queries."""

    def __init__(
        self, contexts: list[int], *, num_heads: int = 16, latent_size: int = 512, rope_size: int = 64,
        block_size: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cuda", seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.contexts, self.block_size, self.latent_size = contexts, block_size, latent_size
        counts = [-(-context // block_size) for context in contexts]
        width = latent_size + rope_size
        cache = torch.full((sum(counts) + 1, 2, 1, 1, block_size, width), torch.nan, dtype=dtype)
        table = torch.full((len(contexts), max(counts)), 2**30, dtype=torch.int32)
        order = torch.randperm(len(cache), generator=generator).int()
        place = 0
        for sequence, (context, count) in enumerate(zip(contexts, counts, strict=True)):
            table[sequence, :count] = order[place : place + count]
            place += count
            rows = torch.randn((count * block_size, width), generator=generator)
            rows[context:] = torch.nan
            cache[table[sequence, :count].long(), 1, 0, 0] = rows.view(count, block_size, width).to(dtype)
        self.layer = cache.to(device)[:, 1]
        self.table = table.to(device)
        # Scores have a spread of about 3: some keys stand out, so that running maxima rise late in some rows.
        self.scale = width**-0.5
        self.q, self.q_rope = (
            [(torch.randn((c, num_heads, size), generator=generator) * 3).to(dtype).to(device) for c in contexts]
            for size in (latent_size, rope_size)
        )

    def metadata(self, sequences: list[int], rows: list[int], contexts: list[int]) -> AttentionMetadata:
        device = self.layer.device
        starts = torch.tensor([0, *rows]).cumsum(0)
        positions = torch.cat([torch.arange(c - r, c) for r, c in zip(rows, contexts, strict=True)])
        return AttentionMetadata(
            query_start=starts.int().to(device),
            context_len=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_table=self.table[sequences].contiguous(),
            slot_mapping=torch.full((len(positions),), -1, dtype=torch.int64, device=device),
            positions=positions.to(device),
            num_rows_max=max(rows),
            context_len_max=max(contexts),
        )

    def attend(
        self, sequences: list[int], rows: list[int], contexts: list[int] | None = None, plan: LatentPlan | None = None
    ) -> list[torch.Tensor]:
        """The last `rows` rows of each sequence cut to its context, in one batch: fp32 (rows, H, L) per sequence."""
        contexts = contexts or [self.contexts[sequence] for sequence in sequences]
        picked = list(zip(sequences, rows, contexts, strict=True))
        q, q_rope = (torch.cat([each[s][c - r : c] for s, r, c in picked]) for each in (self.q, self.q_rope))
        out = latent_launch.run_latent_attention(
            q, q_rope, self.layer, self.metadata(sequences, rows, contexts), self.scale, plan or LatentPlan(),
            NUM_MULTIPROCESSORS, torch.float32,
        )  # fmt: skip
        return list(out.split(rows))

    def expected(self, sequence: int) -> torch.Tensor:
        """(rows, H, L): float64 causal attention of all rows."""
        context = self.contexts[sequence]
        blocks = self.table[sequence, : -(-context // self.block_size)].long()
        keys = self.layer[blocks, 0, 0].flatten(0, 1)[:context].double()
        q = torch.cat([self.q[sequence], self.q_rope[sequence]], dim=2).double()
        scores = torch.einsum("thd,cd->htc", q, keys) * self.scale
        future = torch.ones((context, context), dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=2)
        return torch.einsum("htc,cl->thl", weights, keys[:, : self.latent_size])
