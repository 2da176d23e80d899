"""`python -m benchmarks.gpu <what>`: measurements on one CUDA device.

gemm, attention, decode-step   the published figures, appended as JSON lines in --out
tune                           measure every GEMM plan, write the device's plan table to --out
sweep-attention                time attention plans, as JSON lines in --out
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu import record, sweeps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "what", choices=["gemm", "attention", "decode-step", "tune", "sweep-attention", "compile-share"]
    )
    parser.add_argument("share", nargs="*", type=int, help="compile-share: which share, of how many")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="a directory")
    parser.add_argument("--budget", type=float, default=400, help="seconds")
    options = parser.parse_args()
    match options.what:
        case "gemm":
            record.record_gemm(options.out)
        case "attention":
            record.record_attention(options.out)
        case "decode-step":
            record.record_steps(options.out)
        case "tune":
            sweeps.tune(options.out, options.budget)
        case "sweep-attention":
            sweeps.sweep_attention(options.out, options.budget)
        case "compile-share":
            sweeps.compile_share(*options.share)


if __name__ == "__main__":
    main()
