"""Two processes share the tests (pytest-xdist), so that each of them, and whatever they start, computes alone."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
