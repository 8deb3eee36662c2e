"""What the kernels and a whole training step are worth on one CUDA GPU: `python -m benchmarks.gpu`, see docs/gpu-benchmarks.md."""
