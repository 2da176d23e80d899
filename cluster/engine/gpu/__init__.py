"""Running an engine's steps on a CUDA device: staging, graphs, sampling without waiting, memory."""
