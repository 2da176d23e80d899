"""Write requirements.lock: exact versions of everything all extras need, as pip resolves them now.

Run by `make lock` with the Python of an empty virtual environment in the repository root. Names and
versions only: no index, no path, no local version (torch 2.13.0+cpu is torch 2.13.0 on another machine).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BUILD_TOOLS = ("pip", "setuptools", "wheel")
EXTRAS = "ray,bench,dev"
# Versions that are decided here, not by the resolver; torch without a hash, so that pip takes the CPU
# wheel where an index offers one.
DECIDED = ("torch==2.13.0",)
HEADER = """\
# Exact versions of every dependency, all extras included. Written by `make lock`, used as `pip install -c`.
"""


def resolve() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        subprocess.run([*command, "--report", str(report), *DECIDED, *BUILD_TOOLS, f".[{EXTRAS}]"], check=True)
        installs = json.loads(report.read_text())["install"]
    metadata = [install["metadata"] for install in installs]
    return {canonical(item["name"]): item["version"].split("+")[0] for item in metadata}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    versions = resolve()
    versions.pop("tandem-serving")
    lines = [f"{name}=={version}\n" for name, version in sorted(versions.items())]
    Path("requirements.lock").write_text(HEADER + "".join(lines))


if __name__ == "__main__":
    main()
