"""Benchmarks: `python -m bench --help`. Not installed with the package; run from a checkout."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each trace of allocations is announced on stderr
