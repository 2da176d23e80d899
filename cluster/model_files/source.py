"""From what a user typed (a path, a Hugging Face id, `demo`) to files on this machine."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

import msgspec

from cluster.errors import ModelError
from cluster.model_files.cache import Progress, no_progress
from cluster.model_files.demo import DEMO_NAME, fetch_demo
from cluster.model_files.hub import fetch_from_hub

_HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,200}))?")
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class SourceKind(Enum):
    """What a loader finds at `ModelSource.path`."""

    DIRECTORY = "directory"  # config.json, *.safetensors, tokenizer.json
    GGUF = "gguf"  # one file


class ModelSource(msgspec.Struct, frozen=True):
    """A model on this machine. `name` is a short name for people; `revision` a commit, or empty."""

    kind: SourceKind
    path: Path
    name: str
    revision: str = ""


def resolve_model(
    path_or_name: str | Path, progress: Progress = no_progress, *, has_weights: bool = True
) -> ModelSource:
    """Find a model, fetching it if it is named `demo` or by a Hugging Face id (`org/name[@revision]`).

    `has_weights` False: of a Hugging Face id only what a tokenizer needs. A path that exists wins over a Hugging Face
    id. Raises `ModelError` saying what was expected.
    """
    text = str(path_or_name)
    if text == DEMO_NAME:
        return ModelSource(SourceKind.GGUF, fetch_demo(progress), name=DEMO_NAME)
    path = Path(text).expanduser()
    if path.is_dir():
        return _directory(path)
    if path.is_file():
        return _file(path)
    hub_id = _HUB_ID.fullmatch(text)
    if hub_id is None or text.endswith(".gguf"):
        raise ModelError(
            f"no model {text!r}: it is neither a file or directory here, nor a Hugging Face id (org/name), nor 'demo'"
        )
    repository = hub_id["repository"]
    directory, revision = fetch_from_hub(repository, hub_id["revision"], progress, has_weights=has_weights)
    if not has_weights:
        return ModelSource(SourceKind.DIRECTORY, directory, name=repository, revision=revision)
    return msgspec.structs.replace(_directory(directory), name=repository, revision=revision)


def name_of_model(path_or_name: str) -> str:
    """The name that `resolve_model` would give, without fetching anything. Raises `ModelError` as it does."""
    hub_id = _HUB_ID.fullmatch(path_or_name)
    if path_or_name == DEMO_NAME:
        return DEMO_NAME
    if hub_id is not None and not path_or_name.endswith(".gguf") and not Path(path_or_name).exists():
        return hub_id["repository"]
    return resolve_model(path_or_name).name


def _file(path: Path) -> ModelSource:
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: a model is a .gguf file or a directory with config.json and safetensors")
    return ModelSource(SourceKind.GGUF, path, name=path.stem)


def _directory(path: Path) -> ModelSource:
    name = path.resolve().name
    if any(path.glob("*.safetensors")):
        return ModelSource(SourceKind.DIRECTORY, path, name=name)
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return ModelSource(SourceKind.GGUF, gguf_files[0], name=gguf_files[0].stem)
    if gguf_files:
        listed = ", ".join(file.name for file in gguf_files)
        raise ModelError(f"{path}: holds several GGUF files, name one of them: {listed}")
    unsafe = sorted(file.name for file in path.iterdir() if file.suffix in _UNSAFE_SUFFIXES)
    if unsafe:
        raise ModelError(
            f"{path}: holds only pickled weights ({', '.join(unsafe[:3])}), which can run code when loaded; "
            "only safetensors and GGUF are accepted, convert them first"
        )
    raise ModelError(f"{path}: holds no *.safetensors and no *.gguf file")
