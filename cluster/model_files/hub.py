"""Models by Hugging Face id. The one place that knows huggingface_hub."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import ModelError
from cluster.model_files.cache import Progress

# Weights and data only: no Python, no pickles.
_WEIGHTS = ["*.safetensors"]
_DATA = ["*.json", "*.jinja", "merges.txt", "vocab.json"]
_DUPLICATES = ["consolidated*"]  # the same weights in another naming


def fetch_from_hub(
    repository: str, revision: str | None, progress: Progress, *, has_weights: bool = True
) -> tuple[Path, str]:
    """Fetch a snapshot, with or without its weights, and return its directory and the commit it is pinned to.

    Without a revision the main branch is resolved to a commit once, so that the answer names exactly
    what was loaded. Raises `ModelError`: no network, no such model, no access.
    """
    # Imported here: it takes long, and a model given by path never needs it.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HTTPError,  # of httpx or its successor, whichever the hub client uses; not in its __all__
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    wanted = f"{repository}@{revision or 'main'}"
    try:
        commit = HfApi().model_info(repository, revision=revision, timeout=20.0).sha
        if commit is None:
            raise ModelError(f"{wanted}: the Hugging Face hub names no commit for it")
        patterns = [*_WEIGHTS, *_DATA] if has_weights else _DATA
        directory = Path(
            snapshot_download(repository, revision=commit, allow_patterns=patterns, ignore_patterns=_DUPLICATES)
        )
    except HfHubHTTPError as error:
        raise ModelError(f"{wanted} cannot be fetched from the Hugging Face hub: {error}") from error
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{wanted} cannot be fetched, the Hugging Face hub is not reachable from here ({error}); "
            "give the path of a directory or GGUF file instead, or 'demo'"
        ) from error
    fetched_bytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    progress(fetched_bytes, fetched_bytes)
    return directory, commit
