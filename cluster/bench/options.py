"""What a run is asked to do, and the small languages of its flags."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from cluster.errors import ConfigError

MAX_LENGTH = 1 << 20
MAX_STRETCH = 8.0  # of a lognormal length over its median
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Lengths(msgspec.Struct, frozen=True):
    """A distribution of token counts: `512`, `uniform:100:900` or `lognormal:MEDIAN:SIGMA`."""

    kind: Literal["fixed", "uniform", "lognormal"]
    first: float  # the length, the low bound, or the median
    second: float = 0.0  # the high bound, or the sigma of the logarithm

    def draw(self, rng: random.Random) -> int:
        match self.kind:
            case "fixed":
                return int(self.first)
            case "uniform":
                return rng.randint(int(self.first), int(self.second))
            case "lognormal":
                length = self.first * math.exp(rng.gauss(0.0, self.second))
                return max(1, min(round(length), round(self.first * MAX_STRETCH)))

    def __str__(self) -> str:
        return f"{self.first:g}" if self.kind == "fixed" else f"{self.kind}:{self.first:g}:{self.second:g}"


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds in seconds; a request is good if it meets all that are set. `itl` bounds the mean gap between
    tokens of a request, `max_itl` the longest one."""

    ttft: float | None = None
    itl: float | None = None
    max_itl: float | None = None
    e2e: float | None = None


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Exactly one of `rate` (open loop) and `concurrency` (closed loop) is set."""

    url: str  # without /v1
    model: str = ""  # empty: the first one the server names
    endpoint: Literal["completions", "chat"] = "completions"
    rate: float | None = None  # requests per second
    arrivals: Literal["poisson", "constant"] = "poisson"
    concurrency: int | None = None
    num_requests: int | None = None
    duration_s: float | None = None  # no request is sent after it
    num_warmup: int = 0
    prompt_file: Path | None = None
    prompt_tokens: Lengths = Lengths("fixed", 512)
    output_tokens: Lengths = Lengths("fixed", 128)
    temperature: float = 0.0
    ignore_eos: bool = True  # an extension (vLLM, SGLang, Tandem); others are asked without it
    seed: int = 0
    slo: Slo = Slo()
    max_in_flight: int = 4096  # open loop: beyond it a request counts as failed, unsent
    request_timeout_s: float = 600.0


def parse_lengths(text: str, flag: str) -> Lengths:
    """Raises `ConfigError` naming the flag."""
    kind, _, rest = text.partition(":")
    try:
        numbers = [float(part) for part in rest.split(":")] if rest else []
        match kind, numbers:
            case "uniform", [low, high] if 1 <= low <= high <= MAX_LENGTH:
                return Lengths("uniform", int(low), int(high))
            case "lognormal", [median, sigma] if 1 <= median <= MAX_LENGTH and 0 <= sigma <= 3:
                return Lengths("lognormal", median, sigma)
            case _, [] if 1 <= int(kind) <= MAX_LENGTH:
                return Lengths("fixed", int(kind))
    except ValueError:
        pass  # told below
    raise ConfigError(
        f"{flag} {text}: expected a number of tokens such as 512, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"
    )


def parse_slo(text: str) -> Slo:
    """`ttft=500ms,itl=50ms`. Raises `ConfigError`."""
    bounds: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition("=")
        if name not in Slo.__struct_fields__:
            raise ConfigError(f"--slo {part}: {name!r} is none of {', '.join(Slo.__struct_fields__)}")
        bounds[name] = parse_seconds(value, f"--slo {part}")
    return Slo(**bounds)


def parse_seconds(text: str, where: str) -> float:
    """`500ms`, `2s` or `2`. Raises `ConfigError`."""
    text = text.strip()
    unit = next((unit for unit in _SECONDS if text.endswith(unit)), "")
    try:
        seconds = float(text.removesuffix(unit)) * _SECONDS.get(unit, 1.0)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(f"{where}: expected a time such as 500ms or 2s")
    return seconds


def check_options(options: BenchOptions) -> None:
    """Raises `ConfigError` naming the flag."""
    if (options.rate is None) == (options.concurrency is None):
        raise ConfigError("give either --rate (open loop) or --concurrency (closed loop)")
    if options.num_requests is None and options.duration_s is None:
        raise ConfigError("give --requests or --duration, or the run would have no end")
    if not options.url.startswith(("http://", "https://")):
        raise ConfigError(f"{options.url} is no URL, such as http://127.0.0.1:8000")
    bounds: tuple[tuple[str, float | None, Callable[[float], bool]], ...] = (
        ("--rate", options.rate, lambda value: 0 < value <= 1e5),
        ("--concurrency", options.concurrency, lambda value: 1 <= value <= 65_536),
        ("--requests", options.num_requests, lambda value: 1 <= value <= 10**9),
        ("--duration", options.duration_s, lambda value: 0 < value <= 7 * 86_400),
        ("--warmup", options.num_warmup, lambda value: 0 <= value <= 10**6),
        ("--timeout", options.request_timeout_s, lambda value: 0 < value <= 86_400),
        ("--temperature", options.temperature, lambda value: 0 <= value <= 100),
    )
    for flag, value, fits in bounds:
        if value is not None and not fits(value):
            raise ConfigError(f"{flag} {value:g} is out of range")
