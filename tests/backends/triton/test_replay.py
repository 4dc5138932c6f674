# SPDX-License-Identifier: Apache-2.0
"""Launches that are kept and run again are told what planning anew would tell them.

The interpreter never keeps any, so this needs compiled kernels: in a process of its own, for an H100 that is not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_pe.backends.triton import backend as triton

pytestmark = pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}")
ROOT = Path(__file__).parents[3]
OLDER = ROOT / ".venv/triton-3.6"


QUICK = ("window", "packed")  # 5 s each


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("", QUICK),
        pytest.param("", (), marks=pytest.mark.slow),
        pytest.param(str(OLDER), (), marks=pytest.mark.slow),
    ],
    ids=["quick", "installed", "3.6"],
)
def test_replayed_launches(path, names, tmp_path):
    if path and not OLDER.exists():
        pytest.skip("no second Triton: make test installs it")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [path, str(ROOT), str(ROOT / "tests")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests/backends/triton/replayed.py"), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > (8 if names else 40)
