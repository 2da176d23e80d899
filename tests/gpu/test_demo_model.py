"""A real model, SmolLM2-135M, on a GPU: as near to transformers in fp32 as bf16 can be, and the same bits anywhere.

Its file is not fetched here: it is looked for in TANDEM_DEMO_MODEL, then where `cluster launch demo` keeps it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.exactness import Cell, Exactness, compare, make_requests
from cluster.engine.kernels.cuda_ops import CudaOps
from cluster.engine.models.llama import DecoderModel
from cluster.engine.models.loader import load_model, read_model_files
from cluster.engine.models.residual import residual_dtype
from cluster.engine.parallel.group import SingleRank
from cluster.model_files.cache import cache_location
from cluster.model_files.demo import DEMO_FILE
from cluster.model_files.source import resolve_model
from cluster.tokenizer import Tokenizer

MODEL = Path(os.environ.get("TANDEM_DEMO_MODEL") or cache_location() / DEMO_FILE)
if not MODEL.is_file():
    pytest.skip(f"the demo model is not at {MODEL}", allow_module_level=True)

SOURCE = resolve_model(str(MODEL))
NUM_PROMPTS = 6


@pytest.fixture(scope="module")
def ops() -> CudaOps:
    """As a worker computes with for this model."""
    return CudaOps(
        torch.device("cuda"), residual_dtype=residual_dtype(None, "cuda", read_model_files(SOURCE).config.hidden_size)
    )


@pytest.fixture(scope="module")
def model(ops: CudaOps) -> DecoderModel:
    return load_model(MODEL, ops, SingleRank(), ops.device).model


def test_logits_are_as_near_to_fp32_as_on_a_cpu(model: DecoderModel) -> None:
    """There: 99 % of the choices, half the error of transformers in bf16 (`benchmarks.correctness`)."""
    pytest.importorskip("transformers")
    from benchmarks import correctness
    from benchmarks.correctness_texts import QUESTIONS

    tokenizer, device = Tokenizer.load(MODEL), model.ops.device
    reference = correctness.reference_of(MODEL, torch.float32, device)
    prompts = [tokenizer.render_chat([{"role": "user", "content": text}]) for text in QUESTIONS]
    encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts[:NUM_PROMPTS]]
    cases = [correctness.greedy_case(reference, prompt_ids) for prompt_ids in encoded]
    ours = correctness.compare(correctness.forward_of(model), cases)
    half = correctness.forward_of_transformers(correctness.reference_of(MODEL, torch.bfloat16, device))
    yardstick = correctness.compare(half, cases)
    assert ours.rms_error <= 0.6 * yardstick.rms_error
    assert ours.disagreements <= min(yardstick.disagreements, 6)  # of 384 positions; near-ties fall either way


def test_the_same_bits_in_every_way_to_compute(model: DecoderModel, ops: CudaOps) -> None:
    limits = {"max_num_sequences": 32, "max_batched_tokens": 2048, "kv_cache_bytes": 1 << 30, "max_model_len": 2048}
    lab = Exactness(model, ops, make_requests(24, model.config.vocab_size, 12), **limits)
    drafts = {"speculation": {"method": "ngram", "ngram_min": 1}}
    cells = [
        Cell("batch", 24, {}),
        Cell("chunks", 24, {"max_batched_tokens": 97}),
        Cell("split, warm cache", 24, {}, is_warm=True, is_split=True),
        Cell("prompt lookup", 24, drafts),
        Cell("among 256", 24, {"max_num_sequences": 256}, num_neighbours=232),
    ]
    assert compare(lab, cells) == (len(cells), [])
