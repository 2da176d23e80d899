"""Regenerate `cluster/rpc/pb` from `proto/`: `python -m cluster.rpc.generate [--check]`.

Run in the repository root, with the dev extra installed. The generated modules are committed, so that
neither users nor the wheel need a compiler. `--check` writes nothing and exits 1 if they are stale.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from cluster.errors import ConfigError

PROTO_ROOT = Path("proto")
PB_ROOT = Path("cluster/rpc/pb")


def generate(into: Path) -> None:
    """Compile every .proto under `proto/` to `<into>/serving/v1/*_pb2.py` and `.pyi`."""
    from grpc_tools import protoc  # type: ignore[import-untyped]  # dev only, so not imported before it is needed

    sources = sorted(PROTO_ROOT.rglob("*.proto"))
    if not sources:
        raise ConfigError(f"no .proto files under {PROTO_ROOT}: run this in the repository root")
    includes = [f"-I{PROTO_ROOT}", f"-I{files('grpc_tools') / '_proto'}"]
    arguments = ["protoc", *includes, f"--python_out={into}", f"--pyi_out={into}", *map(str, sources)]
    if protoc.main(arguments) != 0:
        raise ConfigError("protoc failed, see its messages above")
    for generated in _generated(into):
        text = generated.read_text()
        # protoc writes imports relative to the proto root; the modules live in our package
        generated.write_text(
            text.replace("from serving.v1 import", f"from {'.'.join(PB_ROOT.parts)}.serving.v1 import")
        )
    for package in (into / "serving", into / "serving" / "v1"):
        (package / "__init__.py").write_text("")


def _generated(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*_pb2.py*") if path.suffix in (".py", ".pyi"))


def is_current() -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = {path.relative_to(scratch): path.read_text() for path in _generated(Path(scratch))}
    committed = {path.relative_to(PB_ROOT): path.read_text() for path in _generated(PB_ROOT)}
    return fresh == committed


def main() -> int:
    if "--check" in sys.argv[1:]:
        if is_current():
            return 0
        sys.stderr.write("cluster/rpc/pb is stale: run `python -m cluster.rpc.generate`\n")
        return 1
    generate(PB_ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
