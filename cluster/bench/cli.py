"""The flags of `cluster bench`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

API_KEY_VARIABLE = "OPENAI_API_KEY"


class _RunByDefault(TyperGroup):
    """`cluster bench URL` is short for `cluster bench run URL`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(cls=_RunByDefault, no_args_is_help=True, rich_markup_mode="markdown")


@bench_app.callback()
def bench() -> None:
    """Put load on an OpenAI-compatible server and measure it: `cluster bench URL`.

    Examples:

    - `cluster bench http://127.0.0.1:8000 --concurrency 8 --requests 100`
    - `cluster bench http://127.0.0.1:8000 --rate 4 --duration 60 --slo ttft=500ms,itl=50ms --html report.html`
    - `cluster bench compare before.jsonl after.jsonl`
    """


@bench_app.command("run")
def run(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server, such as http://127.0.0.1:8000")],
    rate: Annotated[float | None, typer.Option(help="Open loop: requests per second, whatever the answers")] = None,
    arrivals: Annotated[str, typer.Option(help="Open loop: `poisson` or `constant`")] = "poisson",
    concurrency: Annotated[int | None, typer.Option(help="Closed loop: requests in flight")] = None,
    requests: Annotated[int | None, typer.Option(help="How many requests are measured")] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds for which requests are sent")] = None,
    warmup: Annotated[int, typer.Option(help="Requests before the measurement")] = 0,
    prompt_tokens: Annotated[str, typer.Option(help="512, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA")] = "512",
    output_tokens: Annotated[str, typer.Option(help="As --prompt-tokens")] = "128",
    prompts: Annotated[Path | None, typer.Option(help="A file: JSON lines with `prompt`, or a text per line")] = None,
    slo: Annotated[str, typer.Option(help="For the goodput: ttft=500ms,itl=50ms (also max_itl, e2e)")] = "",
    model: Annotated[str, typer.Option(help="Empty: the first one the server names")] = "",
    endpoint: Annotated[str, typer.Option(help="`completions` or `chat`")] = "completions",
    temperature: Annotated[float, typer.Option(help="0: greedy")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Answers of full length; --no-ignore-eos where unknown")] = True,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds for one request")] = 600.0,
    output: Annotated[Path | None, typer.Option(help="Write JSON lines here")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots here")] = None,
) -> None:
    """Measure one server. Exits with 1 if a request failed."""
    from cluster.bench.command import run_bench
    from cluster.bench.options import BenchOptions, parse_lengths, parse_slo
    from cluster.errors import ConfigError

    if arrivals not in ("poisson", "constant"):
        raise ConfigError(f"--arrivals {arrivals}: expected poisson or constant")
    if endpoint not in ("completions", "chat"):
        raise ConfigError(f"--endpoint {endpoint}: expected completions or chat")
    options = BenchOptions(
        url=url.rstrip("/").removesuffix("/v1"),
        model=model,
        endpoint="chat" if endpoint == "chat" else "completions",
        rate=rate,
        arrivals="constant" if arrivals == "constant" else "poisson",
        concurrency=concurrency,
        num_requests=requests,
        duration_s=duration,
        num_warmup=warmup,
        prompt_file=prompts,
        prompt_tokens=parse_lengths(prompt_tokens, "--prompt-tokens"),
        output_tokens=parse_lengths(output_tokens, "--output-tokens"),
        temperature=temperature,
        ignore_eos=ignore_eos,
        seed=seed,
        slo=parse_slo(slo),
        request_timeout_s=timeout,
    )
    api_key = os.environ.get(API_KEY_VARIABLE, "")
    raise typer.Exit(run_bench(options, Console(), api_key=api_key, output=output, html=html))


@bench_app.command("compare")
def compare(
    result_a: Annotated[Path, typer.Argument(metavar="A", help="A result of --output")],
    result_b: Annotated[Path, typer.Argument(metavar="B", help="Another one")],
) -> None:
    """Print two results side by side."""
    from cluster.bench.command import compare as compare_results

    compare_results(result_a, result_b, Console())
