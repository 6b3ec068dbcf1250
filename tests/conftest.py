"""Puts this folder on the path, so that tests of all packages can share their helpers; one thread a worker."""

import os

# Workers of xdist would fight over the cores. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test asks a hub. Read when huggingface_hub is imported, which may be before a test could set it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No test asks a hub; without this, one that names a model that is not there would wait for retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
