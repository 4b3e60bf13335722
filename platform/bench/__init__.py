"""Benchmarks by name. The contract of a benchmark module is in harness.py."""
