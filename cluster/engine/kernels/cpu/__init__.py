"""Kernels for CPUs: three instruction classes, each with its own canonical order (docs/numerics.md).

`arithmetic.py` defines the order of every sum in slow torch, `reference.py` writes the operations in
it, `native.py` offers the fast ones, `admission_cases.py` holds the inputs that must give equal bits.
"""
