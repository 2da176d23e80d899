"""`python -m benchmarks.gpu.moe`: the experts of a Qwen3-30B-A3B layer, tuned and timed in less than a minute.

For each number of rows: every plan of both GEMMs, the best pair, its bits against the plain GEMM expert by
expert, then the whole layer (router, choice, grouping, GEMMs, combination) against what can be had at best and
against torch's grouped GEMM with a sort. The table comes last. A plan that cannot run is named and skipped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from benchmarks.gpu.moe_bench import CANNOT_RUN, MoeBench, Step, Tiling, short
from benchmarks.gpu.moe_candidates import tilings
from benchmarks.gpu.timing import copy_bandwidth_tb_s
from benchmarks.results import append_result
from cluster.engine.kernels.triton.moe_plans import GroupedPlan, MoeEntry, MoeShape, MoeTable
from cluster.engine.kernels.triton.table import file_stem

SHAPES = {
    "qwen3-30b-a3b": MoeShape(num_experts=128, top_k=8, hidden=2048, features=768),
    "mixtral-8x7b": MoeShape(num_experts=8, top_k=2, hidden=4096, features=14336),
}
ROW_COUNTS = (1, 8, 32, 64, 128, 256, 512, 2048, 8192)
_HEADING = " rows  gate_up     down  place  small    layer    floor  frac    torch     x  bits  plan"
_LEGEND = "us; small: router, choice, sum; frac: floor / layer; x: torch / layer; bits that differ; " + (
    short.__doc__ or ""
)


def compile_share(shape: MoeShape, share: int, shares: int) -> None:
    """Compile the kernels of this share of the plans into Triton's cache on disk, on smaller weights."""
    bench = MoeBench(msgspec.structs.replace(shape, hidden=512, features=768), 128)
    cells: dict[object, tuple[Step, GroupedPlan, bool]] = {}
    for num_rows in ROW_COUNTS:
        for kind, block_m in tilings(shape, num_rows):
            step = bench.step(kind, block_m, min(num_rows, 128))
            by_pair = kind == "few" and num_rows * shape.top_k < shape.num_experts
            for silu_mul in (True, False):
                for plan in step.plans(silu_mul=silu_mul):
                    cells.setdefault((kind, block_m, by_pair, plan, silu_mul), (step, plan, silu_mul))
    for step, plan, silu_mul in list(cells.values())[share::shares]:
        try:
            step.gemm(plan, silu_mul=silu_mul)[0]()
        except CANNOT_RUN:
            continue  # it is named when it is measured
    torch.cuda.synchronize()


def compile_all(shape_name: str, shares: int = 12) -> None:
    """Processes share the work: compiling is one thread each."""
    command = [sys.executable, "-m", "benchmarks.gpu.moe", "--shape", shape_name, "--share"]
    children = [subprocess.Popen([*command, str(share), str(shares)]) for share in range(shares)]
    for child in children:
        child.wait(timeout=120)


Emit = Callable[[str, float, int], None]


def run(shape_name: str, row_counts: Sequence[int], budget_s: float, emit: Emit) -> MoeTable:
    """Measure, print the table, and return the best plans. `emit` gets each figure: name, value, rows."""
    shape, start = SHAPES[shape_name], time.monotonic()
    compile_all(shape_name)
    print(f"compiled after {time.monotonic() - start:.0f} s")
    bench = MoeBench(shape, max(row_counts))
    copy_tb_s = copy_bandwidth_tb_s(1 << 30)
    entries, lines = [], []
    for num_rows in row_counts:
        tiling = bench.best_tiling(num_rows, start + budget_s)
        if tiling is None:
            lines.append(f"{num_rows:5d}  no plan could run")
            continue
        line, differing = _measure(bench, tiling, num_rows, copy_tb_s, emit)
        lines.append(line)
        if not differing:
            entries.append(MoeEntry(shape=shape, max_rows=num_rows, plan=tiling.plan))
    for failure in bench.failed:
        print("skipped:", failure)
    print(bench.library_down(min(2048, max(row_counts))))
    print(
        f"{shape_name} on {torch.cuda.get_device_name()}, copy {copy_tb_s:.2f} TB/s, {time.monotonic() - start:.0f} s"
    )
    print(_LEGEND, _HEADING, *lines, sep="\n")
    return MoeTable(device=torch.cuda.get_device_name(), entries=tuple(entries))


def _measure(bench: MoeBench, tiling: Tiling, num_rows: int, copy_tb_s: float, emit: Emit) -> tuple[str, int]:
    plan = tiling.plan
    differing = bench.differing(plan, num_rows)
    layer, small = bench.layer_ms(plan, num_rows)
    by_torch, floor = bench.torch_ms(num_rows), bench.floor_ms(num_rows, copy_tb_s)
    emit("layer_us", 1e3 * layer, num_rows)
    emit("floor_fraction", floor / layer, num_rows)
    emit("ratio_vs_torch", by_torch / layer, num_rows)
    return (
        f"{num_rows:5d} {1e3 * tiling.gate_up_ms:8.1f} {1e3 * tiling.down_ms:8.1f} {1e3 * tiling.place_ms:6.1f} "
        f"{1e3 * small:6.1f} {1e3 * layer:8.1f} {1e3 * floor:8.1f} {floor / layer:5.2f} {1e3 * by_torch:8.1f} "
        f"{by_torch / layer:5.2f} {differing:5d}  {plan.kind} {plan.block_m} {short(plan.gate_up)} {short(plan.down)}",
        differing,
    )


def write_table(table: MoeTable, path: Path) -> None:
    """One entry per line, so that a change reads as one."""
    lines = ",\n  ".join(json.dumps(msgspec.to_builtins(entry)) for entry in table.entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n "device": {json.dumps(table.device)},\n "entries": [\n  {lines}\n ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.moe", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--rows", type=int, nargs="*", default=ROW_COUNTS)
    parser.add_argument("--budget", type=float, default=45.0, help="seconds after which no more plans are tried")
    parser.add_argument("--out", type=Path, help="where to write the plans, e.g. cluster/engine/kernels/triton/tables")
    parser.add_argument("--record", type=Path, help="where to append the figures, e.g. benchmarks/results")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share:
        compile_share(SHAPES[options.shape], *options.share)
        return

    def emit(name: str, value: float, num_rows: int) -> None:
        if options.record:
            append_result(
                "moe", name, value, "us" if name.endswith("_us") else "x", {"shape": options.shape, "rows": num_rows},
                device=torch.cuda.get_device_name(), directory=options.record,
            )  # fmt: skip

    table = run(options.shape, options.rows, options.budget, emit)
    if options.out:
        write_table(table, options.out / f"{file_stem(table.device)}-moe.json")


if __name__ == "__main__":
    main()
