"""`cluster verify`: do two deployments give the same bits? No engine, only HTTP."""

from cluster.verify.command import make_options, run, verify
from cluster.verify.comparison import Cell, Difference, Report
from cluster.verify.model import VerifyOptions

__all__ = ["Cell", "Difference", "Report", "VerifyOptions", "make_options", "run", "verify"]
