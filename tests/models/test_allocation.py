"""Large blocks that are freed are the system's again, wherever they lie among others."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import torch
from pathlib import Path
from types import SimpleNamespace
from prefloop.models.allocation import map_large_blocks_of_wide

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))

text = SimpleNamespace(hidden_size=int(sys.argv[1]))
map_large_blocks_of_wide(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text)))
for megabytes in (24, 31):  # the system's own threshold adapts to the largest block that was freed, up to 32 MB
    torch.ones(megabytes << 18)
before = resident()
blocks = [torch.ones(8 << 18) for _ in range(20)]
full = resident() - before
del blocks[::2]
print(full, resident() - before)
"""


def grown(hidden_size):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(hidden_size)], capture_output=True, text=True, timeout=120, check=True
    )
    return [float(number) for number in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps them otherwise")
def test_every_other_block_that_is_freed_goes_back():
    full, left = grown(512)
    assert full == pytest.approx(160, abs=10)
    assert left == pytest.approx(80, abs=10)
