"""Triton kernels for NVIDIA GPUs (built for Hopper, sm_90).

Imported lazily by `cuda_ops`, never at the top of a module that a CPU-only process imports. Under
`TRITON_INTERPRET=1` every kernel runs on the CPU with fp16 or fp32 operands.
"""
