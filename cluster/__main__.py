"""`python -m cluster` is `cluster`."""

from cluster.cli import main

main()
