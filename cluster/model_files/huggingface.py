"""JSON files of a Hugging Face model directory."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from cluster.errors import ModelError

_T = TypeVar("_T")
_MAX_JSON_BYTES = 256 << 20


def decode_json_file(path: Path, kind: type[_T]) -> _T:
    """Decode `path` into `kind`. Raises `ModelError` naming the file, and the field where one is wrong."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {_MAX_JSON_BYTES} bytes")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; a model directory needs it") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error


class _Ends(msgspec.Struct):
    eos_token_id: int | list[int] | None = None

    def ids(self) -> tuple[int, ...]:
        match self.eos_token_id:
            case None:
                return ()
            case int() as token_id:
                return (token_id,)
            case token_ids:
                return tuple(token_ids)


class GenerationDefaults(msgspec.Struct, frozen=True):
    """What ends an answer: `generation_config.json`, else `config.json`; the main id first."""

    eos_token_ids: tuple[int, ...]

    @staticmethod
    def of_directory(directory: Path) -> GenerationDefaults:
        ends: list[int] = []
        for name in ("generation_config.json", "config.json"):
            path = directory / name
            if path.exists():
                ends.extend(decode_json_file(path, _Ends).ids())
        return GenerationDefaults(eos_token_ids=tuple(dict.fromkeys(ends)))
