"""`python -m benchmarks.gpu <what>`: measurements on one CUDA device.

gemm, attention, decode-step, decode-step-fp8
                               the published figures, appended as JSON lines in --out
tune                           measure every GEMM plan, write the device's plan table to --out
sweep-attention                time attention plans, as JSON lines in --out
fp8                            try, time and compare FP8 products, write their plan table to --out
fp8-chains                     FP8 products with chains of 1, 2 and 4 groups: time and error
engine                         the whole engine on an 8B shape; --peer FILE adds ratios to a peer's figures
engine-shapes                  the engine at every shape that --peer FILE has; --model llama-fp8: with FP8 layers
engine-fp8                     `engine` with FP8 layers; --ours FILE has our bf16, which is measured here without it
engine-defaults                our engine with torch's default products and attention; --ours FILE has our own
engine-profile                 where the engine's time goes, by step and by kernel; --only, --requests, --model
exactness                      every way to compute the same requests, bit for bit; --model, --quick
compile-share, compile-engine  compile a share of the kernels of `tune` or an engine (for several processes); --model

Prefill and decode on one GPU: `python -m benchmarks.gpu.split`. Products under sustained load, bf16 or FP8:
`python -m benchmarks.gpu.sustained`. Every bf16 plan of some row counts: `python -m benchmarks.gpu.tune_rows`; by
what a whole decode step takes with it: `python -m benchmarks.gpu.tune_step`; that step at every size that has a graph:
`python -m benchmarks.gpu.step_sizes`.
Rotary embedding in the attention of decode steps or before it: `python -m benchmarks.gpu.rope_attention`.
A residual stream in fp32: `python -m benchmarks.gpu.residual`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from benchmarks.gpu import (
    engine,
    engine_profile,
    fp8,
    fp8_chains,
    fp8_vet,
    record,
    record_engine,
    record_exactness,
    record_fp8,
    record_shapes,
    sweeps,
    torch_defaults,
)
from benchmarks.gpu.shapes import ROW_COUNTS

_WHAT = (
    *("gemm", "attention", "decode-step", "decode-step-fp8", "tune", "sweep-attention", "fp8", "fp8-vet", "fp8-chains"),
    *("engine", "engine-shapes", "engine-fp8", "engine-defaults", "engine-profile", "exactness"),
    *("compile-share", "compile-engine"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("what", choices=_WHAT)
    parser.add_argument("share", nargs="*", type=int, help="compile-*: which share, of how many; fp8-vet: plans")
    parser.add_argument("--peer", type=Path, help="JSON lines of the peer's script on the same machine")
    parser.add_argument("--ours", type=Path, help="engine-fp8, engine-defaults: engine_8b records, or their directory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="a directory")
    parser.add_argument("--budget", type=float, help="seconds (default 400; fp8: 60; exactness: no bound)")
    parser.add_argument("--only", choices=("prefill", "decode", "mixed"), help="engine-profile: one workload")
    parser.add_argument(
        "--graph-prompt-rows", type=int, nargs="+", metavar="ROWS",
        help="engine-profile: the mixed workload with each of these values, compared",
    )  # fmt: skip
    parser.add_argument("--requests", type=int, default=512, help="engine-profile: of the mixed workload")
    parser.add_argument(
        "--model",
        action="append",
        choices=tuple(record_exactness.MODELS),
        help="exactness, compile-engine: not all; engine-profile, engine-shapes: llama-fp8 instead of llama",
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=ROW_COUNTS, help="compile-share: candidates of these row counts alone"
    )
    parser.add_argument(
        "--epilogues", nargs="+", default=list(sweeps.EPILOGUES), choices=list(sweeps.EPILOGUES), help="compile-share"
    )
    parser.add_argument("--known", action="store_true", help="compile-share: only plans that the table has somewhere")
    parser.add_argument("--quick", action="store_true", help="exactness: six of the cells")
    options = parser.parse_args()

    def takes_fp8() -> bool:
        if options.model not in (None, ["llama"], ["llama-fp8"]):
            parser.error(f"{options.what}: --model is llama or llama-fp8")
        return bool(options.model == ["llama-fp8"])

    match options.what:
        case "gemm":
            record.record_gemm(options.out)
        case "attention":
            record.record_attention(options.out)
        case "decode-step":
            record.record_steps(options.out)
        case "decode-step-fp8":
            record.record_steps(options.out, has_fp8=True)
        case "tune":
            sweeps.tune(options.out, options.budget or 400)
        case "sweep-attention":
            sweeps.sweep_attention(options.out, options.budget or 400)
        case "engine":
            record_engine.record_engine(options.out, options.peer)
        case "engine-shapes":
            if options.peer is None:
                parser.error("engine-shapes needs --peer")
            record_shapes.record_shapes(options.out, options.peer, has_fp8=takes_fp8())
        case "engine-profile":
            has_fp8 = takes_fp8()
            if options.graph_prompt_rows is None:
                engine_profile.profile_engine(options.only, options.requests, has_fp8=has_fp8)
            elif options.only in (None, "mixed"):
                engine_profile.compare_graphs(options.graph_prompt_rows, options.requests, has_fp8=has_fp8)
            else:
                parser.error("--graph-prompt-rows compares the mixed workload")
        case "engine-fp8":
            record_fp8.record_engine_fp8(options.out, options.peer, options.ours)
        case "engine-defaults":
            if options.ours is None:
                parser.error("engine-defaults needs --ours")
            torch_defaults.record_torch_defaults(options.out, options.ours)
        case "exactness":
            models = options.model or list(record_exactness.MODELS)
            record_exactness.record_exactness(
                options.out, models, quick=options.quick, budget_s=options.budget or math.inf
            )
        case "compile-share":
            share, shares = options.share
            sweeps.compile_share(share, shares, options.rows, options.epilogues, is_known=options.known)
        case "fp8":
            fp8.run(options.out, options.budget or 60)
        case "fp8-chains":
            fp8_chains.run(options.budget or 120)
        case "fp8-vet":
            fp8_vet.vet_share(options.share, options.out)
        case "compile-engine":
            for name in options.model or ["llama"]:
                engine.compile_share(record_exactness.MODELS[name][1], *options.share)


if __name__ == "__main__":
    main()
