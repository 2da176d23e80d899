"""`python -m prefill --config FILE.json`: one prefill worker."""

from __future__ import annotations

from cluster.control.process import leave, main
from prefill.worker import PrefillParts

if __name__ == "__main__":
    leave(main(PrefillParts()))
