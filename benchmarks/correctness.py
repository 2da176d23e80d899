"""Is it the right model? Our forward pass against transformers in fp32, on the same GGUF file.

Teacher-forced on the reference's own greedy continuation of chat prompts, and on natural text. The
yardstick for "within bf16 tolerance" is transformers itself in bf16, on the same inputs.

    python -m benchmarks.correctness [--device cuda [--residual-dtype T]] [--model PATH] [--prompts N] [--dry-run]

transformers runs on the same device. Our residual stream is kept in the type that a worker would choose.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

from benchmarks.correctness_texts import NATURAL_TEXTS, QUESTIONS
from benchmarks.results import RESULTS_DIRECTORY, Parameter, append_result
from cluster.engine.config import EngineConfig
from cluster.engine.kernels import get_ops
from cluster.engine.kernels.ops import AttentionMetadata
from cluster.engine.kv_cache import KVCache
from cluster.engine.models.llama import DecoderModel
from cluster.engine.models.loader import load_model, read_model_files
from cluster.engine.models.residual import residual_dtype
from cluster.engine.parallel.group import SingleRank
from cluster.model_files.source import resolve_model
from cluster.tokenizer import Tokenizer

POSITIONS = 64
REQUIRED_AGREEMENT = 0.99

Forward = Callable[[list[int]], torch.Tensor]  # token ids -> (len, V) fp32 logits


@dataclass(frozen=True, slots=True)
class Case:
    """A text and the reference's logits at its last positions: the ones that are judged."""

    token_ids: list[int]
    reference_RV: torch.Tensor


@dataclass(frozen=True, slots=True)
class Comparison:
    """Our logits against the reference's, over all judged positions."""

    positions: int
    disagreements: int
    widest_margin: float  # of the reference between its choice and ours, over the disagreements
    rms_error: float  # of the logits, each row's mean taken out (softmax does not see it)
    max_error: float

    @property
    def agreement(self) -> float:
        return 1.0 - self.disagreements / self.positions


def forward_of(model: DecoderModel) -> Forward:
    """A whole sequence as one step, through a KV cache of its own."""
    device = model.ops.device
    block_size = EngineConfig(device=str(device)).limits.block_size

    @torch.inference_mode()
    def forward(token_ids: list[int]) -> torch.Tensor:
        length = len(token_ids)
        num_blocks = -(-length // block_size)
        cache = KVCache(model.kv_layout(block_size), num_blocks, device)
        metadata = AttentionMetadata(
            query_start=torch.tensor([0, length], dtype=torch.int32, device=device),
            context_len=torch.tensor([length], dtype=torch.int32, device=device),
            block_table=torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
            slot_mapping=torch.arange(length, device=device),
            positions=torch.arange(length, device=device),
            num_rows_max=length,
            context_len_max=length,
        )
        return model.forward(torch.tensor(token_ids, device=device), metadata, cache)

    return forward


def forward_of_transformers(model: PreTrainedModel) -> Forward:
    def forward(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(torch.tensor([token_ids], device=model.device)).logits[0]
        return logits.float()

    return forward


def greedy_case(model: PreTrainedModel, prompt_ids: list[int]) -> Case:
    """The prompt and the reference's most likely continuation; it goes on after an end token."""
    token_ids = list(prompt_ids)
    past = None
    rest = torch.tensor([prompt_ids], device=model.device)
    rows: list[torch.Tensor] = []
    with torch.inference_mode():
        for _ in range(POSITIONS):
            output = model(rest, past_key_values=past, use_cache=True)
            past = output.past_key_values
            rows.append(output.logits[0, -1])
            rest = rows[-1].argmax()[None, None]
            token_ids.append(int(rest))
    return Case(token_ids[:-1], torch.stack(rows))


def natural_case(reference: Forward, token_ids: list[int]) -> Case:
    """Every position of a text that somebody wrote."""
    return Case(token_ids, reference(token_ids))


def compare(ours: Forward, cases: Sequence[Case]) -> Comparison:
    positions = disagreements = num_logits = 0
    widest_margin = max_error = squared = 0.0
    for case in cases:
        reference_RV = case.reference_RV
        ours_RV = ours(case.token_ids)[-len(reference_RV) :]
        error_RV = ours_RV - reference_RV
        error_RV -= error_RV.mean(dim=1, keepdim=True)
        chosen_R, wanted_R = ours_RV.argmax(1), reference_RV.argmax(1)
        margin_R = reference_RV.gather(1, wanted_R[:, None]) - reference_RV.gather(1, chosen_R[:, None])
        positions += len(chosen_R)
        disagreements += int((chosen_R != wanted_R).sum())
        widest_margin = max(widest_margin, float(margin_R.max()))
        max_error = max(max_error, float(error_RV.abs().max()))
        squared += float(error_RV.double().square().sum())
        num_logits += error_RV.numel()
    return Comparison(positions, disagreements, widest_margin, (squared / num_logits) ** 0.5, max_error)


def report(metric: str, comparison: Comparison, subject: str, device: str | None, out: Path | None) -> None:
    """`device`: a GPU's name; None: this processor. `out`: where the record goes; None: nowhere."""
    print(
        f"{metric:32} {subject:24} {comparison.agreement:7.3%} "
        f"({comparison.disagreements} of {comparison.positions} differ, widest margin "
        f"{comparison.widest_margin:.3f}; logits rms error {comparison.rms_error:.4f}, "
        f"largest {comparison.max_error:.3f})"
    )
    if out is not None:
        params: dict[str, Parameter] = {
            "subject": subject,
            "reference": "transformers fp32",
            "positions": comparison.positions,
            "disagreements": comparison.disagreements,
            "widest_margin": comparison.widest_margin,
            "logits_rms_error": comparison.rms_error,
            "logits_max_error": comparison.max_error,
        }
        append_result("correctness", metric, comparison.agreement, "fraction", params, device=device, directory=out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--residual-dtype", choices=("bfloat16", "float32"), help="as model.residual_dtype")
    parser.add_argument("--model", default="demo", help="GGUF file or 'demo'")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS_DIRECTORY, help="a directory")
    parser.add_argument("--dry-run", action="store_true", help="print, do not record")
    arguments = parser.parse_args()

    source = resolve_model(arguments.model)
    tokenizer = Tokenizer.load(source)
    files = read_model_files(source)
    residual = residual_dtype(arguments.residual_dtype, arguments.device, files.config.hidden_size)
    ops = get_ops(arguments.device, None, residual)
    subject = f"{ops.name}, {str(ops.residual_dtype).removeprefix('torch.')} residual"
    device = torch.cuda.get_device_name(ops.device) if ops.device.type == "cuda" else None
    ours = forward_of(load_model(files, ops, SingleRank(), ops.device).model)
    reference_model = reference_of(source.path, torch.float32, ops.device)
    reference = forward_of_transformers(reference_model)
    half = forward_of_transformers(reference_of(source.path, torch.bfloat16, ops.device))

    started = time.monotonic()
    prompts = [tokenizer.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts[: arguments.prompts]]
    greedy = [greedy_case(reference_model, prompt_ids) for prompt_ids in encoded]
    natural = [natural_case(reference, tokenizer.encode(text)) for text in NATURAL_TEXTS]
    agreement, yardstick = compare(ours, greedy), compare(half, greedy)
    for metric, comparison, who in (
        ("top1_agreement", agreement, subject),
        ("top1_agreement", yardstick, "transformers bf16"),
        ("top1_agreement_natural_text", compare(ours, natural), subject),
        ("top1_agreement_natural_text", compare(half, natural), "transformers bf16"),
    ):
        report(metric, comparison, who, device, None if arguments.dry_run else arguments.out)
    print(f"{time.monotonic() - started:.0f} s")
    is_right = agreement.agreement >= REQUIRED_AGREEMENT and agreement.rms_error <= yardstick.rms_error
    return 0 if is_right else 1


def reference_of(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """transformers' model of a GGUF file, its weights unpacked: the kernels for packed ones come over the network."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(device)
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
