"""`cluster doctor`: what this machine can do, and how to repair what it cannot."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.doctor import hand_over, kernels, machine
from cluster.doctor.finding import Finding, Status

STYLES = {Status.OK: "green", Status.LIMITED: "yellow", Status.BROKEN: "bold red"}


def examine(router_port: int) -> Iterator[Finding]:
    """Quick checks first. Nothing here changes the machine, except for creating the cache directory."""
    yield machine.python()
    yield machine.packages()
    yield machine.processor()
    yield machine.memory()
    yield machine.model_cache()
    yield machine.router_port(router_port)
    yield from machine.devices()
    yield from kernels.admitted()
    yield hand_over.transfer_check()


def run_doctor(console: Console, as_json: bool, router_port: int) -> bool:
    """Print the report; True if nothing that serving needs is broken."""
    if as_json:
        findings = list(examine(router_port))
    else:
        with console.status("examining"):
            findings = list(examine(router_port))
    healthy = all(finding.status is not Status.BROKEN for finding in findings)
    if as_json:
        report = {"healthy": healthy, "findings": findings}
        console.file.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        console.print(report_table(findings))
        verdict = (
            Text("This machine can serve.", "green") if healthy else Text("Repair what is broken first.", "bold red")
        )
        console.print(verdict)
    return healthy


def report_table(findings: list[Finding]) -> Table:
    table = Table(show_lines=False)
    table.add_column("what", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        found = Text(finding.detail)
        if finding.fix:
            found.append(f"\n→ {finding.fix}", style="cyan")
        table.add_row(finding.name, Text(finding.status.value, style=STYLES[finding.status]), found)
    return table
