"""The `cluster` command. Each subcommand imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from cluster.bench.cli import bench_app
from cluster.errors import ConfigError, TandemError
from cluster.launch.control_cli import drain, scale, status

if TYPE_CHECKING:
    from cluster.config import ClusterConfig

CONFIG_SUFFIXES = (".yaml", ".yml")

app = typer.Typer(
    name="cluster",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""Tandem: LLM serving with separate prefill and decode workers, and the same bits as one process.

Start with

    cluster launch demo

and talk to it with any OpenAI client.""",
)
app.add_typer(bench_app, name="bench")
app.command()(status)
app.command()(drain)
app.command()(scale)

Target = Annotated[
    str,
    typer.Argument(
        help="`demo`, a config file (.yaml), a model directory, a .gguf file, or a Hugging Face id (org/name)",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any configuration key, such as decode.engine.block_size=64"),
]
PrefillOption = Annotated[int | None, typer.Option("--prefill", metavar="N", help="Number of prefill workers")]
DecodeOption = Annotated[int | None, typer.Option("--decode", metavar="M", help="Number of decode workers")]
MonolithicOption = Annotated[
    bool, typer.Option("--monolithic", help="One process with one engine: no prefill pool, no hand-over")
]
RayOption = Annotated[bool, typer.Option("--ray", help="Workers are placed by Ray, on one machine or on many")]
HostOption = Annotated[str | None, typer.Option("--host", help="Address the router listens on [127.0.0.1]")]
PortOption = Annotated[int | None, typer.Option("--port", help="Port of the router; 0 chooses a free one [8000]")]
ExternalOption = Annotated[
    str | None,
    typer.Option(
        "--external",
        metavar="LAUNCHER",
        help="Which outer launcher started this process as one of several ranks: auto, none, torchrun, openmpi, "
        "mpich, slurm, lws [auto]",
    ),
]
NameOption = Annotated[str | None, typer.Option("--name", help="The model's name for clients")]


@app.command()
def launch(
    target: Target,
    prefill: PrefillOption = None,
    decode: DecodeOption = None,
    monolithic: MonolithicOption = False,
    ray: RayOption = False,
    host: HostOption = None,
    port: PortOption = None,
    name: NameOption = None,
    external: ExternalOption = None,
    settings: SetOption = None,
) -> None:
    """Start router and workers on this machine or with Ray, and follow them until Ctrl-C.

    Started by torchrun, srun, mpirun or as a LeaderWorkerSet, each process takes its part instead: rank 0
    the router, the next ones the prefill workers, the last ones the decode workers. There must be one rank
    for each (`cluster plan` shows them).

    Examples:

        cluster launch demo                          one prefill and one decode worker
        cluster launch demo --prefill 2 --decode 2
        cluster launch demo --monolithic             one process, for comparison
        cluster launch ./Qwen3-0.6B --port 9000
        cluster launch cluster.yaml --set decode.engine.max_num_sequences=32
        cluster launch cluster.yaml --ray            in the Ray cluster of this machine, or in one of its own
        torchrun --nproc-per-node 4 -m cluster launch cluster.yaml
        srun -n 4 cluster launch cluster.yaml
        mpirun -n 4 cluster launch cluster.yaml

    `auto` takes a process for a rank only if all variables are there that its launcher gives to ranks; a
    shell in an allocation or a pod, a batch script or one stray variable starts nothing of the kind.
    `--external none` says that this launch stands for itself, whatever is in the environment.
    """
    config = _config(target, prefill, decode, monolithic, host, port, name, external, settings, ray=ray)
    if config.launch.backend == "ray":
        from cluster.launch.ray import launch_ray

        launch_ray(config, Console())
        return
    from cluster.launch.command import launch_here

    if exit_code := launch_here(config, Console(), show_error):
        raise typer.Exit(exit_code)


@app.command()
def plan(
    target: Target,
    prefill: PrefillOption = None,
    decode: DecodeOption = None,
    monolithic: MonolithicOption = False,
    ray: RayOption = False,
    settings: SetOption = None,
) -> None:
    """Check a configuration and show which processes it means. Starts nothing.

    Examples:

        cluster plan cluster.yaml
        cluster plan demo --prefill 2 --decode 4
        cluster plan cluster.yaml --ray              and what Ray is asked for
    """
    from cluster.gpu_share import has_mps
    from cluster.launch.command import show_warnings
    from cluster.launch.cores import usable_cores
    from cluster.launch.external_facts import visible_gpus
    from cluster.launch.gpus import place_on_gpus, shares_of_others, shares_without_effect
    from cluster.launch.ray_plan import check_ray
    from cluster.launch.topology import plan_topology
    from cluster.launch.topology_table import topology_table

    config = _config(target, prefill, decode, monolithic, None, None, None, None, settings, ray=ray)
    warnings: list[str] = []
    is_on_ray = config.launch.backend == "ray"
    if is_on_ray:
        check_ray(config)
        warnings = shares_of_others(config)
    topology = plan_topology(config, usable_cores())
    if not is_on_ray and (num_gpus := visible_gpus(os.environ)):  # elsewhere the plan shows what was asked for
        topology = place_on_gpus(topology, config, num_gpus, has_daemon=has_mps())
        warnings = shares_without_effect(topology, config)
    console = Console()
    console.print(topology_table(topology, config))
    show_warnings(console, warnings)


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="For programs: one JSON object")] = False,
    port: Annotated[int, typer.Option(help="The router's port to be checked")] = 8000,
) -> None:
    """Tell what this machine can do: devices, kernels, the KV transport, ports, memory, model cache.

    Exits with 1 if something is broken that serving needs; each such line says how to repair it.

    Examples:

        cluster doctor
        cluster doctor --json
    """
    from cluster.doctor import run_doctor

    if not run_doctor(Console(), json_output, port):
        raise typer.Exit(1)


@app.command()
def verify(
    url_a: Annotated[str, typer.Argument(metavar="URL_A", help="A deployment, such as http://127.0.0.1:8000")],
    url_b: Annotated[str | None, typer.Argument(metavar="URL_B", help="Another one with the same model")] = None,
    monolithic: Annotated[
        str | None,
        typer.Option("--monolithic", metavar="MODEL", help="Start one process with this model and compare with it"),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(help="How many prompts, of lengths that matter (64)", min=1, max=10_000)
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens per answer (16)", min=1, max=100_000)] = None,
    concurrency: Annotated[str, typer.Option(help="Requests in flight, one round for each")] = "1,8,32",
    record: Annotated[Path | None, typer.Option(help="Keep the answers of URL_A in this file")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with the answers in this file")] = None,
    settings: SetOption = None,
) -> None:
    """Send the same prompts to two deployments: token ids and logprob bits must be equal.

    Exits with 1 at the first difference and says where it is. `--set` is for the one that
    `--monolithic` starts.

    Examples:

        cluster verify http://127.0.0.1:8000 http://127.0.0.1:9000
        cluster verify http://127.0.0.1:8000 --monolithic demo
        cluster verify http://127.0.0.1:8000 --record today.json
        cluster verify http://127.0.0.1:8000 --against today.json
    """
    from cluster.verify import make_options, run

    if url_b is not None and monolithic is not None:
        raise ConfigError("give either URL_B or --monolithic, not both")
    options = make_options(prompts, max_tokens, concurrency, against)
    with ExitStack() as stack:
        if monolithic is not None:
            from cluster.launch.companion import monolithic_companion

            with Console().status(f"starting {monolithic} as one process"):
                url_b = stack.enter_context(monolithic_companion(monolithic, settings or []))
        exit_code = run(url_a, url_b, options=options, record=record, against=against)
    raise typer.Exit(exit_code)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as version_of

    Console().print(f"tandem-serving {version_of('tandem-serving')}", highlight=False)


def _config(
    target: str,
    prefill: int | None,
    decode: int | None,
    monolithic: bool,
    host: str | None,
    port: int | None,
    name: str | None,
    external: str | None,
    settings: list[str] | None,
    *,
    ray: bool,
) -> ClusterConfig:
    from cluster.config import load_config

    flags: list[tuple[str, str, object]] = [
        ("--prefill", "prefill.replicas", prefill),
        ("--decode", "decode.replicas", decode),
        ("--monolithic", "monolithic", "true" if monolithic else None),
        ("--ray", "launch.backend", "ray" if ray else None),
        ("--host", "router.host", host),
        ("--port", "router.port", port),
        ("--name", "model.served_name", name),
        ("--external", "launch.external", external),
    ]
    is_file = target.endswith(CONFIG_SUFFIXES)
    if not is_file:
        flags.insert(0, ("the model", "model.path", target))
    overrides = [(origin, key, str(value)) for origin, key, value in flags if value is not None]
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected KEY=VALUE, such as --set router.port=9000")
        overrides.append((f"--set {setting}", key.strip(), text))
    return load_config(Path(target) if is_file else None, environment=os.environ, overrides=overrides)


def main() -> None:
    """Run the command; an error of ours is a message, never a traceback."""
    try:
        app()
    except TandemError as error:
        show_error(error)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def show_error(error: TandemError) -> None:
    kind = "configuration" if isinstance(error, ConfigError) else error.code.replace("_", " ")
    message = Text(f"{kind}: ", style="bold red").append(error.message, style="default")
    Console(stderr=True).print(message, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
