"""`cluster status`, `cluster drain` and `cluster scale`: talk to a launch that is running on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.launch.control_messages import Command, Deployment

PidOption = Annotated[
    int | None, typer.Option("--pid", help="Process id of the launch, if several run", show_default=False)
]


def status(
    pid: PidOption = None, json_output: Annotated[bool, typer.Option("--json", help="For programs")] = False
) -> None:
    """Show the workers of a running launch and what they do."""
    from cluster.launch.control_messages import Deployment, Status

    deployment = _ask(pid, Status())
    assert isinstance(deployment, Deployment)
    if json_output:
        import msgspec

        typer.echo(msgspec.json.encode(deployment).decode())
    else:
        _show(deployment)


def drain(
    worker: Annotated[str, typer.Argument(help="Its name, such as prefill-0", show_default=False)],
    pid: PidOption = None,
) -> None:
    """Take one worker out of a running launch: no new work, its requests finish, then it ends.

    Example: `cluster drain prefill-0`. `cluster scale prefill=2` starts another one in its place.
    """
    from cluster.launch.control_messages import Drain

    _ask(pid, Drain(worker))


def scale(
    pools: Annotated[list[str], typer.Argument(metavar="ROLE=N...", help="Such as prefill=3 decode=1")],
    pid: PidOption = None,
) -> None:
    """Change the number of workers of a running launch. Workers that go are drained first.

    Example: `cluster scale prefill=3 decode=1`
    """
    from cluster.launch.control_messages import Scale
    from cluster.types import Role

    replicas: dict[Role, int] = {}
    for pool in pools:
        role, _, count = pool.partition("=")
        if role not in [known.value for known in Role] or not count.isdecimal():
            raise ConfigError(f"{pool}: expected prefill=N or decode=N")
        replicas[Role(role)] = int(count)
    _ask(pid, Scale(replicas))


def _ask(pid: int | None, command: Command) -> object:
    from cluster.launch.control_messages import Done, Refused
    from cluster.launch.control_socket import ask, find_launch

    answer = ask(find_launch(pid), command, typer.echo)
    match answer:
        case Refused(why):
            raise ConfigError(why)
        case Done(what, is_clean):
            typer.echo(what)
            if not is_clean:
                raise typer.Exit(1)
    return answer


def _show(deployment: Deployment) -> None:
    from rich.table import Table

    table = Table("worker", "state", "address", "pid", "running", "waiting", "free blocks", box=None)
    for worker in deployment.workers:
        has_answered = bool(worker.engine_id)  # one in the router's own process has no port to be asked at
        blocks = f"{worker.num_free_blocks}/{worker.num_blocks}"
        load = (str(worker.num_running), str(worker.num_waiting), blocks) if has_answered else ("-", "-", "-")
        address = "in the router" if worker.address.endswith(":0") else worker.address
        table.add_row(worker.name, worker.state, address, str(worker.pid), *load)
    console = Console()
    console.print(f"{deployment.model_name} at {deployment.url}/v1", highlight=False)
    console.print(table)
