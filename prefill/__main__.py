"""`python -m prefill --config FILE.json`: one prefill worker."""

from __future__ import annotations

import sys

from cluster.control.process import main
from prefill.worker import PrefillParts

if __name__ == "__main__":
    sys.exit(main(PrefillParts()))
