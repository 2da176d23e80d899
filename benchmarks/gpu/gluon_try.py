"""`python -m benchmarks.gpu.gluon_try --out FILE`: stream and hopper plans on one GPU, bits first, then time.

check    every plan against the reference, in child processes (which compile, too); one that hangs is ended
decode   a whole 8B decode step as one graph: the table's plans, then stream plans chosen layer by layer
prefill  the layers of the 8B shape at 8192 and 4096 rows: torch.mm, the table's plan, hopper plans, taking turns

Every part runs in processes of its own with a timeout, so a hang costs that part. A plan that hung or differed is
not timed. FILE gets everything as JSON; `entries` and `entry` have the form of a plan table's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import gluon_parts

_SILENCE_S = {"check": 60.0, "warm": 60.0, "decode": 30.0, "prefill": 30.0}  # longest wait for a child's next line
Lines = list[dict[str, Any]]


class Child:
    """One part in a process. Its lines are collected; silence ends it."""

    def __init__(self, part: str, *arguments: str) -> None:
        self.name, self.lines = " ".join((part, *arguments[:1])), Lines()
        self._silence_s = _SILENCE_S[part]
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed by _end)
        command = [sys.executable, "-m", "benchmarks.gpu.gluon_try", "--part", part, *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        self._heard = time.monotonic()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard = time.monotonic()
            if line.startswith("{"):
                self.lines.append(json.loads(line))

    def wait(self, deadline_s: float) -> str:
        """Empty, or what went wrong."""
        while self._process.poll() is None:
            if time.monotonic() > min(deadline_s, self._heard + self._silence_s):
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may take its time
                    self._process.wait(timeout=15)
                return self._end(f"{self.name}: ended, silent for {time.monotonic() - self._heard:.0f} s")
            time.sleep(0.05)
        code = self._process.returncode
        return self._end(f"{self.name}: exit status {code}" if code else "")

    def _end(self, problem: str) -> str:
        self._reader.join(timeout=5)
        self._errors.seek(0)
        tail = self._errors.read()[-1500:]
        self._errors.close()
        return f"{problem}\n{tail}" if problem else ""


def gather(children: Sequence[Child], deadline_s: float) -> tuple[Lines, list[str]]:
    problems = [problem for child in children if (problem := child.wait(deadline_s))]
    return [line for child in children for line in child.lines], problems


def verdicts(lines: Lines) -> dict[int, str]:
    """Per plan: empty if equal, else why it is not timed."""
    found = {line["begin"]: "hung, or its process ended" for line in lines if "begin" in line}
    return found | {line["checked"]: "; ".join(line["failures"]) for line in lines if "checked" in line}


def print_checks(checked: dict[int, str]) -> None:
    plans = gluon_parts.plans_to_check()
    for index, plan in enumerate(plans):
        problem = checked.get(index, "not reached")
        if problem:
            print(f"NOT EQUAL {index} {gluon_parts.short(plan)}: {problem[:400]}")
    print(f"equal: {sum(checked.get(index) == '' for index in range(len(plans)))} of {len(plans)} plans")


def print_decode(lines: Lines) -> None:
    for rows in gluon_parts.DECODE_ROWS:
        mine = [line for line in lines if line.get("rows") == rows and "layer" in line]
        for line in mine:
            if line["what"] != "try":
                print(f"M={rows:<3} {line['layer']:8} {line['ms']:7.3f} ms  {line['what']}  {line.get('short', '')}")
        for layer in gluon_parts.DECODE_LAYERS:
            tried = [line for line in mine if line["what"] == "try" and line["layer"] == layer]
            best = sorted(tried[1:], key=lambda line: line["ms"])[:3]
            table = f"table {tried[0]['ms']:.3f} ({tried[0]['short']})" if tried else "not tried"
            print(f"      {layer:8} {table}; " + ", ".join(f"{line['ms']:.3f} ({line['short']})" for line in best))
        for line in lines:
            if line.get("rows") == rows and line.get("what") == "entries":
                ratio = line["ms"] / line["table_ms"]
                print(f"M={rows}: chosen / table = {ratio:.3f}, pdl {line['pdl']}, same tokens: {line['same_tokens']}")


def print_prefill(lines: Lines) -> None:
    for line in lines:
        figures = f"{line['ms']:8.4f} ms {line['tflops']:6.1f} TFLOP/s, / torch.mm {line['vs_mm']:.3f}"
        print(f"{line['layer']:10} {line['rows']:5} {figures}  {line['name']}")


def run_all(out: Path, budget_s: float) -> None:
    start = time.monotonic()
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "problems": []}

    def part(name: str, children: Sequence[Child], until_s: float) -> Lines:
        lines, problems = gather(children, start + until_s)
        report[name] = lines
        report["problems"] += problems
        report[f"{name}_ended_s"] = round(time.monotonic() - start, 1)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1))
        return lines

    first = [Child("check", str(share)) for share in range(gluon_parts.CHECK_SHARES)]
    first += [Child("warm", str(share)) for share in range(gluon_parts.WARM_SHARES)]
    checked = verdicts(part("check", first, 0.55 * budget_s))
    print_checks(checked)
    good = json.dumps([index for index, problem in checked.items() if not problem])
    prefill = part("prefill", [Child("prefill", good)], 0.75 * budget_s)
    left = budget_s - (time.monotonic() - start)
    decode = part("decode", [Child("decode", good, str(left - 8))], budget_s)
    for problem in report["problems"]:
        print("PROBLEM", problem)
    print_decode(decode)
    print_prefill(prefill)
    ended = {name: report[f"{name}_ended_s"] for name in ("check", "prefill", "decode")}
    print(f"{report['device']}; parts ended at {ended} s; JSON: {out}")


def run_part(part: str, arguments: Sequence[str]) -> None:
    parts: dict[str, Callable[[], None]] = {
        "check": lambda: gluon_parts.check(int(arguments[0])),
        "warm": lambda: gluon_parts.warm(int(arguments[0])),
        "prefill": lambda: gluon_parts.prefill(set(json.loads(arguments[0]))),
        "decode": lambda: gluon_parts.decode(set(json.loads(arguments[0])), time.monotonic() + float(arguments[1])),
    }
    parts[part]()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.gluon_try", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("gluon.json"), help="a JSON file")
    parser.add_argument("--budget", type=float, default=150, help="seconds for everything; parts are cut to fit")
    parser.add_argument("--part", choices=list(_SILENCE_S), help="used by the program itself")
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        run_part(options.part, options.arguments)
    else:
        run_all(options.out, options.budget)


if __name__ == "__main__":
    main()
