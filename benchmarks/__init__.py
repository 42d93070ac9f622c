"""Benchmarks: users of the public API, and of single kernels."""
