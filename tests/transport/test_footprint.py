"""Peak memory of all layer pairs: that of one pair, however many there are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

N, M, T = 768, 1024, 64
COST = 4 * N * M

PROGRAM = f"""
import json, re, sys
from pathlib import Path
import jax, numpy as np
from ot_merge_jax.transport import coupling
from ot_merge_jax.types import Activations, HParams, MergeSpec

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def peak(layers, source_layers):
    rng = np.random.default_rng(0)
    sides = []
    for count, width in ((layers, {N}), (source_layers, {M})):
        one = rng.normal(size=({T}, width)).astype(np.float32)
        many = np.broadcast_to(one, (count, *one.shape))
        sides.append(Activations({{"mlp_in": many, "up_out": many[:, :, :8]}}, np.arange({T})))
    spec = MergeSpec(weights=("up",), max_iterations=3)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    jax.block_until_ready(coupling.couple(*sides, HParams(1.0, 0.1), spec=spec))
    return status("VmHWM") - before

peak(1, 4)  # libraries and programs
peak(6, 4)
json.dump([peak(1, 4), peak(6, 4)], sys.stdout)
"""


@pytest.mark.process
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be reset here"
)
def test_peak_does_not_grow_with_the_pairs():
    # what is freed is given back at once, so that it is not there before it is measured
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout)
    assert few > COST / 2  # it is measured at all
    assert many - few < 5 * COST  # of 20 pairs more
