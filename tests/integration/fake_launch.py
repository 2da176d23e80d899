"""Launches fake processes with the real launcher: arguments NAME=BEHAVIOUR[:FILE] ... ."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from rich.console import Console

from cluster.config import LaunchSettings
from cluster.errors import StartupError
from cluster.launch.local import LocalLauncher
from cluster.launch.process import ProcessSpec
from cluster.launch.view import Serving, launch_view


def spec(name: str, behaviour: str, stop_order: int = 1) -> ProcessSpec:
    return ProcessSpec(
        name=name,
        command=("tests.integration.fake_process", *behaviour.split(":", 1)),
        environment={"PYTHONPATH": str(Path(__file__).parents[2])},
        stop_order=stop_order,
    )


async def no_probe() -> None:
    return


async def main(arguments: list[str]) -> int:
    specs = [spec(name, behaviour) for name, _, behaviour in (argument.partition("=") for argument in arguments)]
    serving = Serving(url="http://127.0.0.1:1", model_name="fake", summary=f"{len(specs)} fakes")
    with launch_view(serving, [each.name for each in specs], Console()) as view:
        try:
            await LocalLauncher(specs, LaunchSettings(), view, no_probe).run()
        except StartupError as error:
            sys.stderr.write(f"{error.message}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
