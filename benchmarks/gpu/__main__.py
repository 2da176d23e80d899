"""`python -m benchmarks.gpu <what>`: measurements on one CUDA device.

gemm, attention, decode-step, decode-step-fp8
                               the published figures, appended as JSON lines in --out
tune                           measure every GEMM plan, write the device's plan table to --out
sweep-attention                time attention plans, as JSON lines in --out
fp8                            try, time and compare FP8 products, write their plan table to --out
engine                         the whole engine on an 8B shape; --peer FILE adds ratios to a peer's figures
engine-profile                 where the engine's time goes, step by step and kernel by kernel; --only, --requests
exactness                      every way to compute the same requests, bit for bit
compile-share, compile-engine  compile a share of the kernels of `tune` or `engine` (for several processes)

Prefill and decode on one GPU: `python -m benchmarks.gpu.split`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu import engine, engine_profile, fp8, fp8_vet, record, record_engine, sweeps

_FP8 = ("fp8", "fp8-vet", "decode-step-fp8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "what",
        choices=[
            *("gemm", "attention", "decode-step", "tune", "sweep-attention", "engine", "engine-profile", "exactness"),
            *("compile-share", "compile-engine"),
            *_FP8,
        ],
    )
    parser.add_argument("share", nargs="*", type=int, help="compile-*: which share, of how many; fp8-vet: plans")
    parser.add_argument("--peer", type=Path, help="JSON lines of the peer's script on the same machine")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="a directory")
    parser.add_argument("--budget", type=float, help="seconds (default 400; fp8: 60)")
    parser.add_argument("--only", choices=("prefill", "decode", "mixed"), help="engine-profile: one workload")
    parser.add_argument("--requests", type=int, default=512, help="engine-profile: of the mixed workload")
    options = parser.parse_args()
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
        case "engine-profile":
            engine_profile.profile_engine(options.only, options.requests)
        case "exactness":
            record_engine.record_exactness(options.out)
        case "compile-share":
            sweeps.compile_share(*options.share)
        case "fp8":
            fp8.run(options.out, options.budget or 60)
        case "fp8-vet":
            fp8_vet.vet_share(options.share, options.out)
        case "compile-engine":
            engine.compile_share(*options.share)


if __name__ == "__main__":
    main()
