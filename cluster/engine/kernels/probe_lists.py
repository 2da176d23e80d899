"""The probes of admission and fingerprint. Changing one changes every fingerprint."""

from __future__ import annotations

from dataclasses import replace

from cluster.engine.kernels.ops import GroupedRouting
from cluster.engine.kernels.probes import (
    CacheShape,
    Magnitudes,
    attention_probe,
    embedding_probe,
    linear_probe,
    norm_probe,
    rope_probe,
    silu_probe,
    softmax_probe,
)
from cluster.engine.kernels.probes_fp8 import fp8_groups_probe, fp8_layers_probe, fp8_linear_probe
from cluster.engine.kernels.probes_latent import LatentShape, grouped_route_probe, head_linear_probe, latent_probe
from cluster.engine.kernels.probes_moe import combine_probe, experts_probe, route_probe

LINEAR_PROBES = (
    linear_probe(1, 48, 64, Magnitudes.NORMAL),
    linear_probe(3, 50, 100, Magnitudes.WIDE),
    linear_probe(17, 70, 576, Magnitudes.CANCELLING),
    linear_probe(33, 33, 33, Magnitudes.DENORMAL),
    linear_probe(40, 64, 130, Magnitudes.WIDE),
    linear_probe(290, 40, 96, Magnitudes.WIDE),
    linear_probe(2, 16, 1536, Magnitudes.CANCELLING),
    silu_probe(1, 32, 64, Magnitudes.NORMAL),
    silu_probe(5, 25, 100, Magnitudes.NORMAL),
    silu_probe(70, 48, 96, Magnitudes.NORMAL),
)
_SHAPE = CacheShape(64, 6, 2, 16, ((0, 40), (250, 262), (511, 513), (300, 301), (0, 1)))
ATTENTION_PROBES = (
    attention_probe(_SHAPE),
    attention_probe(replace(_SHAPE, magnitudes=Magnitudes.WIDE, block_size=32)),
    attention_probe(CacheShape(48, 4, 4, 16, ((500, 530),))),
    attention_probe(CacheShape(128, 8, 1, 64, ((255, 257), (1024, 1025)))),
    attention_probe(CacheShape(256, 2, 1, 16, ((250, 270),))),
    attention_probe(CacheShape(64, 8, 2, 64, ((2045, 2048),), Magnitudes.CANCELLING)),
    attention_probe(CacheShape(96, 3, 1, 16, ((40, 60),), Magnitudes.DENORMAL)),
    attention_probe(replace(_SHAPE, window=40)),
    attention_probe(CacheShape(64, 4, 2, 32, ((500, 530), (0, 50), (600, 601)), Magnitudes.WIDE, window=24)),
    attention_probe(CacheShape(128, 8, 1, 64, ((1539, 1540), (700, 701)), window=520)),
    attention_probe(CacheShape(64, 8, 2, 64, ((2045, 2048),), Magnitudes.CANCELLING, window=1100)),
)
ROPE_PROBES = (
    rope_probe(replace(_SHAPE, has_norms=True)),
    rope_probe(CacheShape(80, 3, 1, 16, ((20, 30), (3, 4)), Magnitudes.WIDE)),
)
NORM_PROBES = (
    norm_probe(1, 576, Magnitudes.NORMAL),
    norm_probe(5, 100, Magnitudes.WIDE),
    norm_probe(3, 64, Magnitudes.DENORMAL),
)
EMBEDDING_PROBES = (embedding_probe(7, 72),)
SOFTMAX_PROBES = (softmax_probe(3, 1000), softmax_probe(1, 515))
_SIGMOID = GroupedRouting(top_k=4, num_groups=8, top_groups=3, scoring="sigmoid", renormalise=True, scale=2.5)
_SOFTMAX = GroupedRouting(top_k=3, num_groups=4, top_groups=2, scoring="softmax", renormalise=False, scale=16.0)
MOE_PROBES = (
    grouped_route_probe(20, 64, _SIGMOID),
    grouped_route_probe(9, 40, _SOFTMAX),
    route_probe(3, 8, 2, renormalise=True),
    route_probe(40, 60, 4, renormalise=False),
    route_probe(2, 128, 8, renormalise=True),
    experts_probe(1, 4, 64, 32, 2, Magnitudes.NORMAL),
    experts_probe(21, 6, 72, 40, 3, Magnitudes.CANCELLING),
    experts_probe(70, 4, 40, 33, 2, Magnitudes.WIDE),
    combine_probe(1, 8, 64, Magnitudes.NORMAL),
    combine_probe(5, 8, 100, Magnitudes.WIDE),
    combine_probe(3, 2, 64, Magnitudes.DENORMAL),
)
LATENT_PROBES = (
    latent_probe(LatentShape(128, 64, 6, 16, ((0, 20), (511, 513), (0, 1)))),
    latent_probe(LatentShape(512, 64, 8, 64, ((1023, 1026), (300, 301)), Magnitudes.CANCELLING)),
    latent_probe(LatentShape(64, 32, 3, 32, ((40, 60),), Magnitudes.WIDE)),
    head_linear_probe(1, 4, 128, 64, Magnitudes.NORMAL),
    head_linear_probe(19, 3, 40, 512, Magnitudes.CANCELLING),
)
FP8_PROBES = (
    fp8_linear_probe(1, 96, 64, Magnitudes.NORMAL),
    fp8_linear_probe(9, 160, 300, Magnitudes.WIDE),
    fp8_linear_probe(40, 64, 576, Magnitudes.CANCELLING),
    fp8_linear_probe(3, 32, 1100, Magnitudes.DENORMAL),
    fp8_linear_probe(17, 320, 384, Magnitudes.WIDE, block_rows=64),
    fp8_linear_probe(70, 128, 1000, Magnitudes.CANCELLING, block_rows=128),
    fp8_groups_probe(17, 96, 1664),
    fp8_layers_probe(5, 96, 160),
    fp8_layers_probe(2, 576, 1536, block_rows=32),
)
ALL_PROBES = (
    *LINEAR_PROBES,
    *ATTENTION_PROBES,
    *ROPE_PROBES,
    *NORM_PROBES,
    *EMBEDDING_PROBES,
    *SOFTMAX_PROBES,
    *MOE_PROBES,
)
