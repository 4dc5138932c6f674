# SPDX-License-Identifier: Apache-2.0
"""A short form of what `make soak` does for minutes."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys

import pytest
import stress
import torch
from oracles import SEED

pytest.importorskip("transformers", minversion="5")  # its attention interface takes the rotation by hand

# dynamo traces for 5 to 10 s
EPISODES = [(kind, number) for kind in stress.EPISODES for number in range(1 if kind is stress.compiled else 2)]

OTHER_PROCESS = """
import pickle, sys, torch
model, images = pickle.load(open(sys.argv[1], "rb"))
with torch.inference_mode():
    found = {grid: model(pixel_values=x).last_hidden_state for grid, x in images.items()}
pickle.dump(found, open(sys.argv[2], "wb"))
"""


@pytest.mark.filterwarnings("ignore:.*attention dropout is active")
@pytest.mark.parametrize("kind, number", EPISODES, ids=lambda x: getattr(x, "__name__", x))
def test_episode(kind, number):
    kind(random.Random(SEED + number))


def test_pickled_to_another_process(tmp_path):
    """After forwards of other grids, whose memory stays behind."""
    pair = stress.make(random.Random(SEED))
    for x in pair.images.values():
        pair.model(pixel_values=x)
    there, back = tmp_path / "there", tmp_path / "back"
    there.write_bytes(pickle.dumps((pair.model, pair.images)))
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, there, back], check=True, timeout=300)
    found = pickle.loads(back.read_bytes())
    for grid, (expected, _) in pair.truth.items():
        torch.testing.assert_close(found[grid], expected, rtol=0, atol=1e-4 * expected.abs().max().item())
