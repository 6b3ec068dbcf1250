"""Puts this folder on the path, so that tests of all packages can share their helpers; one thread a worker."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers of xdist would fight over the cores; read when torch is imported
