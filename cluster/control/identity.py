"""What this worker's KV is, for the handshake: from the loaded model and the geometry of its pool."""

from __future__ import annotations

import msgspec

from cluster.engine.kv_cache import KVLayout
from cluster.engine.models.loader import LoadedModel
from kvconnector.core.handshake import KVIdentity

KV_AXES = "NL2HSD"  # see cluster/engine/kv_cache.py


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
        attention_kind="mha" if config.num_heads == config.num_kv_heads else "gqa",
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        rope=rope,
        kv_layout=KV_AXES,
        numeric_fingerprint=numeric_fingerprint,
        transports=(transport,),
    )
