"""Models with sliding windows: against transformers in fp32, from both file formats, and what is refused, by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import PreTrainedModel

from cluster.engine.models.llama import DecoderModel
from cluster.errors import ModelError
from tests.unit.model_factory import logits_of, random_model, save_gguf, save_safetensors, whole_sequence
from tests.unit.virtual_ranks import load, run_ranks

WINDOW = 24
BOUND = 0.02  # of bf16 activations, as in `assert_close_to`
PROMPT = torch.randint(3, 320, (90,), generator=torch.Generator().manual_seed(3))
ON = {"use_sliding_window": True, "sliding_window": WINDOW}
WINDOWED: list[tuple[str, dict[str, Any], list[int | None]]] = [
    ("mistral", {"sliding_window": WINDOW}, [WINDOW, WINDOW]),
    ("qwen2", ON | {"max_window_layers": 0}, [WINDOW, WINDOW]),
    ("qwen2", ON | {"max_window_layers": 1}, [None, WINDOW]),
    ("qwen3", ON | {"layer_types": ["sliding_attention", "full_attention"]}, [WINDOW, None]),
]


def windows_of(model: DecoderModel) -> list[int | None]:
    return [model.config.window_of_layer(index) for index in range(model.config.num_layers)]


def edit(directory: Path, **changes: Any) -> None:
    """Change config.json; a value of ... takes the field away."""
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def error_of(model: DecoderModel, reference: PreTrainedModel) -> float:
    with torch.inference_mode():
        wanted = reference(PROMPT[None]).logits[0]
    return float((logits_of(model, PROMPT) - wanted).square().mean().sqrt() / wanted.std())


@pytest.mark.parametrize(("family", "overrides", "windows"), WINDOWED)
def test_prompts_longer_than_the_window_agree_with_transformers(
    family: str, overrides: dict[str, Any], windows: list[int | None], tmp_path: Path
) -> None:
    reference = random_model(family, **overrides)
    model = load(save_safetensors(reference, tmp_path)).model
    assert windows_of(model) == windows
    assert error_of(model, reference) < BOUND
    edit(tmp_path, sliding_window=WINDOW + 1)
    assert error_of(load(tmp_path).model, reference) > BOUND, "the bound would not notice one key more"


def rows_in_chunks(model: DecoderModel, chunk: int) -> torch.Tensor:
    """(T, V) logits of the prompt, `chunk` rows in a step."""
    whole = whole_sequence(model, len(PROMPT))
    logits = []
    for start in range(0, len(PROMPT), chunk):
        end = min(start + chunk, len(PROMPT))
        metadata = replace(
            whole.metadata,
            query_start=torch.tensor([0, end - start], dtype=torch.int32),
            context_len=torch.tensor([end], dtype=torch.int32),
            slot_mapping=whole.metadata.slot_mapping[start:end],
            positions=whole.metadata.positions[start:end],
            num_rows_max=end - start,
            context_len_max=end,
        )
        logits.append(model.forward(PROMPT[start:end], metadata, whole.cache))
    return torch.cat(logits)


@pytest.mark.parametrize(("family", "overrides", "windows"), WINDOWED)
def test_chunks_and_single_rows_give_the_bits_of_the_whole_prompt(
    family: str, overrides: dict[str, Any], windows: list[int | None], tmp_path: Path
) -> None:
    model = load(save_safetensors(random_model(family, **overrides), tmp_path)).model
    whole = rows_in_chunks(model, len(PROMPT))
    for chunk in (1, 7, 32):
        assert torch.equal(rows_in_chunks(model, chunk), whole), chunk


def test_tensor_parallel_ranks_give_the_bits_of_one(tmp_path: Path) -> None:
    save_safetensors(random_model("mistral", sliding_window=8), tmp_path)
    (alone,), kv_alone = run_ranks(tmp_path, 1)
    ranks, kv = run_ranks(tmp_path, 3)
    assert all(torch.equal(logits.view(torch.int32), alone.view(torch.int32)) for logits in ranks)
    assert torch.equal(kv.view(torch.int16), kv_alone.view(torch.int16))


@pytest.mark.parametrize(
    ("family", "overrides"), [("mixtral", {"sliding_window": WINDOW}), WINDOWED[2][:2], WINDOWED[3][:2]]
)
def test_gguf_and_safetensors_give_the_same_bits(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    reference = random_model(family, **overrides)
    from_gguf = load(save_gguf(reference, tmp_path / "tiny.gguf", GGMLQuantizationType.BF16)).model
    model = load(save_safetensors(reference, tmp_path / "directory")).model
    assert windows_of(from_gguf) == windows_of(model) != [None, None]
    assert torch.equal(logits_of(from_gguf, PROMPT), logits_of(model, PROMPT))


def test_another_window_is_another_model(tmp_path: Path) -> None:
    """What a prefill and a decode worker compare before they pair."""
    save_safetensors(random_model("mistral"), tmp_path)
    digests = set()
    for window in (WINDOW, WINDOW + 1, None):
        edit(tmp_path, sliding_window=window)
        digests.add(load(tmp_path).identity.config_digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("mistral", {"sliding_window": None}, [None, None]),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 8192}, [4096, 4096]),  # as transformers
        ("mistral", {"sliding_window": 256}, [None, None]),  # holds every context
        ("mistral", {"sliding_window": 24, "layer_types": ["sliding_attention"] * 2}, [24, 24]),
        ("mixtral", {"sliding_window": ..., "max_position_embeddings": 8192}, [None, None]),
        ("mixtral", {"sliding_window": 24}, [24, 24]),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 24, "layer_types": ...}, [None, None]),
        ("qwen2", {**ON, "layer_types": ...}, [None, None]),  # 28 layers are full
        ("qwen2", {**ON, "layer_types": ..., "max_window_layers": 1}, [None, 24]),
        ("qwen2", {**ON, "layer_types": ["full_attention", "sliding_attention"]}, [None, 24]),
        ("qwen3_moe", ON, [24, 24]),
        ("llama", {"sliding_window": 24}, [None, None]),  # transformers has no window there
    ],
)
def test_layers_get_the_window_that_transformers_gives_them(
    family: str, changes: dict[str, Any], windows: list[int | None], tmp_path: Path
) -> None:
    save_safetensors(random_model(family), tmp_path)
    edit(tmp_path, **changes)
    assert windows_of(load(tmp_path).model) == windows


def test_a_window_shorter_than_a_stretched_context_is_kept(tmp_path: Path) -> None:
    save_safetensors(random_model("qwen2"), tmp_path)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10_000.0}
    edit(
        tmp_path,
        use_sliding_window=True,
        sliding_window=256,
        max_window_layers=0,
        layer_types=...,
        rope_parameters=yarn,
    )
    assert windows_of(load(tmp_path).model) == [256, 256]


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        (
            "qwen2",
            {**ON, "layer_types": ["full_attention", "chunked_attention"]},
            "'chunked_attention' is not supported",
        ),
        ("qwen2", {**ON, "layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types has 'sliding_attention', and no sliding_w"),
        (
            "mistral",
            {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
            "layer_types other than 'sliding_attention' are not supported for mistral",
        ),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types has 'sliding_attention', and no sliding_w"),
        ("llama", ON, "sliding_window 24 is not supported for llama"),
        ("qwen3_moe", {**ON, "max_window_layers": 1}, "use_sliding_window together with max_window_layers"),
    ],
)
def test_an_unsupported_pattern_is_refused_by_name(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save_safetensors(random_model(family), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ModelError, match=words) as caught:
        load(tmp_path)
    assert "config.json" in caught.value.message


@pytest.mark.parametrize(
    ("pattern", "words"),
    [(2, "sliding_window_pattern is not supported unless"), ([True], "sliding_window_pattern lists 1 of 2 layers")],
)
def test_an_unsupported_pattern_in_gguf_is_refused_by_name(
    pattern: int | list[bool], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = gguf.GGUFWriter.add_sliding_window_pattern
    monkeypatch.setattr(gguf.GGUFWriter, "add_sliding_window_pattern", lambda writer, _: add(writer, pattern))
    path = save_gguf(
        random_model("qwen2", **ON, max_window_layers=1), tmp_path / "tiny.gguf", GGMLQuantizationType.BF16
    )
    with pytest.raises(ModelError, match=words):
        load(path)
