"""Benchmarks: `python -m benchmarks.run [PATTERN]`; what each name means is in docs/benchmarks.md."""
