"""Benchmarks: ``python -m bench.cpu`` times the CPU kernels against their peers."""
