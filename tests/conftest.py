"""What all tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

# A busy machine is no failure: speed is measured in benchmarks, not asserted in tests.
settings.register_profile("tandem", deadline=None)
settings.load_profile("tandem")


def pytest_configure() -> None:
    """A run in the background of a script begins with SIGINT ignored, and so would every process that a test starts:
    none would end at Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, by name, on a machine without a CUDA device."""
    of_gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not of_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in of_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """What the libraries and the collected tests consist of stays to the end. A full collection that looked at it each
    time would stop every thread for a quarter of a second, in the midst of tests about timeouts and streams."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_the_user() -> Iterator[None]:
    """`TANDEM_ROUTER__PORT=…` in the user's shell must not change what a test sees."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("TANDEM_") and "__" in name:
                patch.delenv(name)
        yield
