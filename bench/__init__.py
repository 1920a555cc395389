"""Benchmarks: `python -m bench --help`. Not installed with the package; run from a checkout."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise each trace of allocations is announced on stderr
# The threads of an operation wait for each other by spinning, by default for milliseconds, which keeps a thread that
# shares its core with another process from getting on: on a busy machine, operations took 5 to 20 times as long. GNU's
# OpenMP and Intel's read this when PyTorch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("KMP_BLOCKTIME", "1")
