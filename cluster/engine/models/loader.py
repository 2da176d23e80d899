"""Loading a model: files -> weights of one rank, packed for its device.

Tensors are read one after the other and packed at once, so that beside the packed weights only one
fused layer is in memory. A tied embedding is held once, as the packed lm_head; with several ranks
each holds the whole table too, because its lm_head is only a part of it.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch

from cluster.engine.gpu.memory import check_weights_fit
from cluster.engine.kernels.ops import ExpertWeight, GroupedRouting, Ops
from cluster.engine.models.config import ExpertsConfig, LatentConfig, ModelConfig, WeightFormat
from cluster.engine.models.config_gguf import config_from_gguf
from cluster.engine.models.config_huggingface import config_from_directory
from cluster.engine.models.expert_names import ExpertPart, expert_name, router_name
from cluster.engine.models.feed_forward import DenseFeedForward
from cluster.engine.models.identity import ModelIdentity, identity_of_gguf, identity_of_safetensors
from cluster.engine.models.llama import DecoderModel, DecoderWeights, LayerWeights
from cluster.engine.models.moe import MoeFeedForward
from cluster.engine.models.moe_grouped import GroupedMoeFeedForward
from cluster.engine.models.rank_reader import EMBEDDING, LM_HEAD, RankReader
from cluster.engine.models.rope import rope_table
from cluster.engine.models.weights import WeightSource
from cluster.engine.models.weights_gguf import open_gguf_weights
from cluster.engine.models.weights_latent import LatentReader
from cluster.engine.models.weights_safetensors import open_safetensors_weights
from cluster.engine.parallel.group import ParallelGroup
from cluster.engine.parallel.sharding import Range
from cluster.errors import ModelError
from cluster.model_files.cache import Progress, no_progress
from cluster.model_files.gguf_header import read_gguf_header
from cluster.model_files.safetensors_header import read_safetensors_directory
from cluster.model_files.source import ModelSource, SourceKind, resolve_model

logger = logging.getLogger(__name__)
_SHOWN_EVERY_S = 1.0


class LoadedModel(NamedTuple):
    """What a worker starts from."""

    model: DecoderModel
    config: ModelConfig
    identity: ModelIdentity


class ModelFiles(NamedTuple):
    """A model that is here, of whose files the headers have been read and no weight."""

    source: ModelSource
    config: ModelConfig  # as the files say it
    open_weights: Callable[[], WeightSource]
    identify: Callable[[ModelConfig, str, Progress], ModelIdentity]


def read_model_files(source: ModelSource) -> ModelFiles:
    """Raises `ModelError` naming the file, tensor or field."""
    match source.kind:
        case SourceKind.GGUF:
            header = read_gguf_header(source.path)
            config = config_from_gguf(header)
            return ModelFiles(
                source, config, partial(open_gguf_weights, header, config), partial(identity_of_gguf, header)
            )
        case SourceKind.DIRECTORY:
            config = config_from_directory(source.path)
            tensors = read_safetensors_directory(source.path)
            open_weights = partial(open_safetensors_weights, source.path, tensors)
            return ModelFiles(source, config, open_weights, partial(identity_of_safetensors, tensors))


def load_model(
    files: ModelFiles | ModelSource | str | Path,
    ops: Ops,
    group: ParallelGroup,
    device: torch.device,
    *,
    max_position: int | None = None,
    quantization: Literal["fp8"] | None = None,
    progress: Progress = no_progress,
    hashing: Progress = no_progress,
) -> LoadedModel:
    """Load the part of `group.rank` onto `device`.

    `max_position` shortens the context (and the rotary table). `quantization` makes FP8 of a checkpoint that
    is not FP8 already. `progress` counts first a download, if there is one, then bf16 bytes loaded. `hashing` counts
    bytes of weight files whose digest is not known yet, when all are loaded and that is what is waited for. Raises
    `ModelError` naming the file, tensor or field.
    """
    if not isinstance(files, ModelFiles):
        files = read_model_files(files if isinstance(files, ModelSource) else resolve_model(files, progress))
    source, config = files.source, files.config
    weights = files.open_weights()
    is_made_fp8 = quantization == "fp8" and config.weight_format is WeightFormat.BF16
    if is_made_fp8:
        config = msgspec.structs.replace(config, weight_format=WeightFormat.FP8)
    if config.weight_format is not WeightFormat.BF16 and config.experts is not None:
        raise ModelError(f"{source.path}: FP8 is served for dense models only, this one has experts; leave it in bf16")
    if config.weight_format is not WeightFormat.BF16 and config.latent is not None:
        raise ModelError(f"{source.path}: FP8 is not served with latent attention; leave it in bf16")
    if config.weight_format is not WeightFormat.BF16 and device.type == "cpu":
        logger.warning("%s: FP8 on a CPU is emulated: slow, for tests", source.path)
    num_positions = min(max_position or config.max_position, config.max_position)
    try:
        if device.type == "cuda":
            check_weights_fit(device, config.weight_bytes // group.size)
        # Hashing leaves the interpreter to the loader.
        with ThreadPoolExecutor(max_workers=1) as pool, _Hashing() as hashed:
            identity = pool.submit(files.identify, config, source.revision, hashed.note)
            loader = _RankLoader(config, weights, ops, group, device, progress, is_made_fp8)
            model = DecoderModel(config, loader.load(num_positions), ops, group)
            while not wait([identity], _SHOWN_EVERY_S).done:
                hashing(*hashed.bytes)
            return LoadedModel(model, config, identity.result())
    finally:
        weights.close()
        ctypes.CDLL(None).malloc_trim(0)  # glibc would keep what the temporary copies took


class _Hashing:
    """What a hashing thread has told last. Once this is left, what it tells next ends it: a model that cannot be loaded
    is not hashed to its end."""

    def __init__(self) -> None:
        self.bytes = (0, 0)  # done, in total
        self._is_over = False

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True

    def note(self, done_bytes: int, total_bytes: int) -> None:
        if self._is_over:
            raise ModelError("the model could not be loaded: its weights need no digest")
        self.bytes = (done_bytes, total_bytes)


class _RankLoader(RankReader):
    """Builds one rank's layers from what it reads."""

    def load(self, num_positions: int) -> DecoderWeights:
        config = self.config
        lm_head_name = EMBEDDING if config.tie_embeddings else LM_HEAD
        lm_head = self._linear([(lm_head_name, config.vocab_size, self.plan.vocab)], config.hidden_size)
        is_shared = config.tie_embeddings and self.plan.vocab.length == config.vocab_size
        embedding_VK = None if is_shared else self._rows(EMBEDDING, (config.vocab_size, config.hidden_size))
        layers = tuple(self._layer(index) for index in range(config.num_layers))
        final_norm_K = self._vector("model.norm.weight", config.hidden_size)
        self._refuse_unused()
        self.progress(self.total_bytes, self.total_bytes)
        return DecoderWeights(
            embedding_VK=embedding_VK,
            layers=layers,
            final_norm_K=final_norm_K,
            lm_head=lm_head,
            rope_table_PD=rope_table(config, num_positions, self.device),
        )

    def _layer(self, index: int) -> LayerWeights:
        config, plan = self.config, self.plan
        if config.latent is not None:
            return self._latent_layer(index, config.latent)
        prefix, experts = f"model.layers.{index}", config.experts_of_layer(index)
        hidden, head_size = config.hidden_size, config.head_size
        attention = f"{prefix}.self_attn"
        q_rows = Range(plan.heads.query.start * head_size, plan.heads.query.stop * head_size)
        kv_rows = Range(plan.heads.kv.start * head_size, plan.heads.kv.stop * head_size)
        qkv = [
            ("q_proj", config.num_heads * head_size, q_rows),
            ("k_proj", config.num_kv_heads * head_size, kv_rows),
            ("v_proj", config.num_kv_heads * head_size, kv_rows),
        ]
        qkv_weights = [(f"{attention}.{name}.weight", total, rows) for name, total, rows in qkv]
        qkv_biases = [(f"{attention}.{name}.bias", total, rows) for name, total, rows in qkv]
        return LayerWeights(
            input_norm_K=self._vector(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._layer_linear(qkv_weights, hidden),
            qkv_bias_C=self._bias(qkv_biases) if config.qkv_bias else None,
            q_norm_D=self._vector(f"{attention}.q_norm.weight", head_size) if config.qk_norm else None,
            k_norm_D=self._vector(f"{attention}.k_norm.weight", head_size) if config.qk_norm else None,
            output=self._layer_linear(
                [(f"{attention}.o_proj.weight", hidden, plan.hidden)], config.num_heads * head_size
            ),
            post_attention_norm_K=self._vector(f"{prefix}.post_attention_layernorm.weight", hidden),
            feed_forward=self._dense(f"{prefix}.mlp") if experts is None else self._moe(prefix, experts),
        )

    def _latent_layer(self, index: int, latent: LatentConfig) -> LayerWeights:
        config, plan = self.config, self.plan
        prefix, experts = f"model.layers.{index}", config.experts_of_layer(index)
        attention, hidden = f"{prefix}.self_attn", config.hidden_size
        reader = LatentReader(config, latent, plan.heads.query, self._copy, self.ops)
        mixed_size = config.num_heads * latent.value_size
        return LayerWeights(
            input_norm_K=self._vector(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self.ops.pack_linear(reader.qkv(attention).to(self.device)),
            qkv_bias_C=None,
            q_norm_D=None,
            k_norm_D=None,
            output=self._linear([(f"{attention}.o_proj.weight", hidden, plan.hidden)], mixed_size),
            post_attention_norm_K=self._vector(f"{prefix}.post_attention_layernorm.weight", hidden),
            feed_forward=self._dense(f"{prefix}.mlp") if experts is None else self._grouped_moe(prefix, experts),
            latent=reader.attention(attention),
        )

    def _dense(self, prefix: str) -> DenseFeedForward:
        return self._dense_of(prefix, self.config.ffn_size, self.plan.ffn)

    def _dense_of(self, prefix: str, ffn: int, columns: Range) -> DenseFeedForward:
        hidden = self.config.hidden_size
        gate_up = [(f"{prefix}.{name}.weight", ffn, columns) for name in ("gate_proj", "up_proj")]
        return DenseFeedForward(
            gate_up=self._layer_linear(gate_up, hidden),
            down=self._layer_linear([(f"{prefix}.down_proj.weight", hidden, self.plan.hidden)], ffn),
        )

    def _moe(self, prefix: str, experts: ExpertsConfig) -> MoeFeedForward:
        hidden, ffn, total = self.config.hidden_size, experts.ffn_size, experts.num_experts
        router = router_name(self.config.architecture, prefix)
        return MoeFeedForward(
            router=self._linear([(router, total, Range(0, total))], hidden),
            gate_up=self._experts(prefix, total, (ExpertPart.GATE, ExpertPart.UP), (ffn, hidden)),
            down=self._experts(prefix, total, (ExpertPart.DOWN,), (hidden, ffn)),
            top_k=experts.top_k,
            renormalise=experts.renormalise,
        )

    def _grouped_moe(self, prefix: str, experts: ExpertsConfig) -> GroupedMoeFeedForward:
        plain, shared = self._moe(prefix, experts), None
        if experts.num_shared:
            shared = self._dense_of(
                f"{prefix}.mlp.shared_experts", experts.num_shared * experts.ffn_size, self.plan.shared
            )
        bias_name = f"{prefix}.mlp.gate.e_score_correction_bias"
        routing = GroupedRouting(
            top_k=experts.top_k,
            num_groups=experts.num_groups,
            top_groups=experts.top_groups,
            scoring=experts.scoring,
            renormalise=experts.renormalise,
            scale=experts.weight_scale,
        )
        return GroupedMoeFeedForward(
            router=plain.router,
            bias_E=self._vector(bias_name, experts.num_experts) if experts.scoring == "sigmoid" else None,
            routing=routing,
            gate_up=plain.gate_up,
            down=plain.down,
            shared=shared,
        )

    def _experts(
        self, prefix: str, num_experts: int, parts: tuple[ExpertPart, ...], shape: tuple[int, int]
    ) -> ExpertWeight:
        """Pack this rank's experts; the tensors of the others must be there all the same."""
        mine = self.plan.experts
        fused_EPNK = torch.empty((mine.length, len(parts), *shape), dtype=torch.bfloat16)
        for expert in range(num_experts):
            for place, part in enumerate(parts):
                name = expert_name(self.config.architecture, prefix, expert, part)
                if mine.start <= expert < mine.stop:
                    self._copy(name, shape, Range(0, shape[0]), fused_EPNK[expert - mine.start, place])
                else:
                    self.source.check(name, shape)
                    self.used.add(name)
        return self.ops.pack_experts(fused_EPNK.flatten(1, 2).to(self.device))
