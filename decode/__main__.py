"""`python -m decode --config FILE.json`: one decode worker."""

from __future__ import annotations

from cluster.control.process import leave, main
from decode.worker import DecodeParts

if __name__ == "__main__":
    leave(main(DecodeParts()))
