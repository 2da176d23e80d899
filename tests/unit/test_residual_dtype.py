"""Which type a residual stream is kept in."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from gguf import GGMLQuantizationType

from cluster.control.process import load_worker
from cluster.control.worker_config import WorkerConfig
from cluster.engine.config import EngineConfig
from cluster.engine.kernels import get_ops
from cluster.engine.models.loader import load_model, read_model_files
from cluster.engine.models.residual import WIDEST_IN_FLOAT32, ResidualName, residual_dtype
from cluster.engine.parallel.group import SingleRank
from cluster.errors import ConfigError
from cluster.model_files.source import resolve_model
from decode.worker import DecodeParts
from tests.unit.model_factory import random_model, save_gguf, save_safetensors


@pytest.mark.parametrize(
    ("asked", "device", "width", "expected"),
    [
        (None, "cuda", WIDEST_IN_FLOAT32, torch.float32),
        (None, "cuda:3", WIDEST_IN_FLOAT32 + 1, torch.bfloat16),
        ("float32", "cuda", 8192, torch.float32),
        ("bfloat16", "cuda", 64, torch.bfloat16),
        (None, "cpu", 8192, torch.float32),
        ("float32", "cpu", 8192, torch.float32),
    ],
)
def test_the_model_and_the_configuration_decide(
    asked: ResidualName | None, device: str, width: int, expected: torch.dtype
) -> None:
    assert residual_dtype(asked, device, width) == expected


def test_a_cpu_has_one_type_and_says_so(tmp_path: Path) -> None:
    directory = save_safetensors(random_model("llama"), tmp_path)
    config = WorkerConfig(
        model=str(directory),
        transport="loopback",
        engine=EngineConfig(num_threads=1),
        model_residual_dtype="bfloat16",
    )
    with pytest.raises(ConfigError, match=r"model\.residual_dtype: bfloat16 is for GPUs"):
        load_worker(config, DecodeParts())
    assert get_ops("cpu", 1).residual_dtype == residual_dtype(None, "cpu", 64)


@pytest.mark.parametrize("is_gguf", [False, True])
def test_a_configuration_is_read_without_the_weights(is_gguf: bool, tmp_path: Path) -> None:
    model = random_model("qwen3")
    if is_gguf:
        path = save_gguf(model, tmp_path / "model.gguf", GGMLQuantizationType.Q8_0)
    else:
        path = save_safetensors(model, tmp_path)
    source = resolve_model(str(path))
    loaded = load_model(source, get_ops("cpu", 1), SingleRank(), torch.device("cpu"))
    assert msgspec.to_builtins(read_model_files(source).config) == msgspec.to_builtins(loaded.config)
