"""Benchmarks: `python -m bench --help`. Not installed with the package; run from a checkout."""
