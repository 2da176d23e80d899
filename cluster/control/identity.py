"""What this worker's KV is, for the handshake: from the loaded model and the geometry of its pool."""

from __future__ import annotations

import msgspec

from cluster.engine.kv_cache import KVLayout
from cluster.engine.models.config import ModelConfig
from cluster.engine.models.loader import LoadedModel
from kvconnector.core.handshake import KVIdentity


def kv_identity(loaded: LoadedModel, layout: KVLayout, numeric_fingerprint: str, transport: str) -> KVIdentity:
    config, identity = loaded.config, loaded.identity
    rope = msgspec.json.encode((config.rope_theta, config.rope_scaling), order="deterministic").decode()
    return KVIdentity(
        config_digest=identity.config_digest,
        weights_digest=identity.weights_digest,
        revision=identity.revision,
        quantisation=identity.quantisation,
        adapters=identity.adapters,
        kv_dtype=layout.dtype,
        attention_kind=_attention_kind(config),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_size=layout.head_size,
        rope=rope,
        kv_layout=f"NL{layout.num_planes}HSD",  # see cluster/engine/kv_cache.py
        numeric_fingerprint=numeric_fingerprint,
        transports=(transport,),
    )


def _attention_kind(config: ModelConfig) -> str:
    if config.latent is not None:
        return "mla"
    return "mha" if config.num_heads == config.num_kv_heads else "gqa"
