"""The mutable state of one request in one engine."""
