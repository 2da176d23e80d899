"""`python -m decode --config FILE.json`: one decode worker."""

from __future__ import annotations

import sys

from cluster.control.process import main
from decode.worker import DecodeParts

if __name__ == "__main__":
    sys.exit(main(DecodeParts()))
