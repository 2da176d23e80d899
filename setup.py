"""Builds the native CPU kernels; everything else is in pyproject.toml.

The extension is optional: without a compiler the installation succeeds, and the kernels are built at
first use or replaced by slow ones, with a warning.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("kernel_build", ROOT / "cluster/engine/kernels/cpu/build.py")
assert _spec is not None
assert _spec.loader is not None
kernel_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kernel_build)


class BuildKernels(build_ext):
    """Plain C shared library with a target per file, so the compiler is called by our own rules."""

    def build_extension(self, ext: Extension) -> None:
        try:
            kernel_build.compile_library(Path(self.get_ext_fullpath(ext.name)).absolute())
        except kernel_build.BuildError as error:
            raise CompileError(str(error)) from error


def _relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


setup(
    ext_modules=[
        Extension(
            "cluster.engine.kernels.cpu._native",
            sources=_relative(kernel_build.translation_units()),
            depends=_relative(kernel_build.headers()),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
