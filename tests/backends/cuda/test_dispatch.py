# SPDX-License-Identifier: Apache-2.0
"""When the CUDA kernels serve a call, what they launch for it, and what is said where they cannot."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracles import Case, make

from spatial_pe.backends import cuda
from spatial_pe.backends.base import AttentionCall
from spatial_pe.backends.triton import backend as triton
from spatial_pe.ops import select

ROOT = Path(__file__).parents[3]
KIB = 1024
# multiprocessors, bytes of shared memory a block can ask for and an SM has
H100 = (132, 227 * KIB, 228 * KIB)
A100 = (108, 163 * KIB, 164 * KIB)
RTX = (128, 99 * KIB, 100 * KIB)  # Ada, consumer Blackwell


def call_of(tokens: int, dim: int, batch: int = 64, heads: int = 16, windows: bool = False) -> AttentionCall:
    with torch.device("meta"):
        lead = (1, batch * tokens) if windows else (batch, tokens)
        q, k, v = torch.empty(*lead, 3, heads, dim, dtype=torch.bfloat16).unbind(2)
        bounds = torch.empty(batch + 1, dtype=torch.int32) if windows else None
    return AttentionCall(q, k, v, None, dim**-0.5, bounds, tokens if windows else None, None)


def plan(extension, direction: str, device: tuple[int, int, int], *shape, **options) -> list[dict]:
    arguments, _ = cuda._arguments(call_of(*shape, **options))
    return extension.plan(arguments, direction, *device)


@pytest.mark.parametrize(
    ("device", "tokens", "dim", "expected"),
    [
        (H100, 196, 64, {"resident": True, "passes": 1, "threads": 32 * 11}),
        (H100, 256, 64, {"resident": True, "passes": 1, "threads": 32 * 12}),
        (H100, 576, 64, {"resident": True, "passes": 3, "threads": 32 * 12}),
        (H100, 576, 80, {"resident": True, "passes": 3}),
        (H100, 729, 64, {"resident": True}),
        (H100, 729, 72, {"resident": False}),  # 212 KB of keys and values and 28 of queries
        (H100, 1024, 64, {"resident": False, "slots": 6}),
        (A100, 576, 64, {"resident": True}),
        (A100, 729, 64, {"resident": False}),
        (RTX, 256, 64, {"resident": True}),
        (RTX, 576, 64, {"resident": False}),
    ],
)
def test_forward_plans(device, tokens, dim, expected, extension):
    """Keys and values that fit stay; the fewest passes, and no more warps than they need."""
    (launch,) = plan(extension, "forward", device, tokens, dim)
    assert launch["kernel"] == "forward" and launch["shared"] <= device[1]
    assert launch["blocks"] == device[0]
    assert {key: launch[key] for key in expected} == expected


def test_one_image_is_spread_over_the_device(extension):
    """16 heads of one image for 132 SMs: smaller blocks, and several for a head."""
    (large,) = plan(extension, "forward", H100, 576, 64)
    (small,) = plan(extension, "forward", H100, 576, 64, batch=1)
    assert small["blocks"] >= 128 and small["threads"] < large["threads"] and small["passes"] == 1


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("device", [H100, A100, RTX])
@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
def test_every_plan_fits_its_device(device, dim, direction, extension):
    for tokens in (1, 16, 17, 64, 65, 128, 129, 196, 256, 257, 577, 729, 1025, 4096):
        for batch in (1, 64):
            launches = plan(extension, direction, device, tokens, dim, batch=batch)
            assert launches
            for launch in launches:
                assert 0 <= launch["shared"] <= device[1] and launch["blocks"] > 0
                assert launch["threads"] % 32 == 0 and launch["threads"] <= 384, launch


def test_backward_plans(extension):
    """One block for all keys of up to 256 tokens at D = 64, 128 at more; else three launches."""

    def kernels(*shape) -> list[str]:
        return [launch["kernel"] for launch in plan(extension, "backward", H100, *shape)]

    assert kernels(64, 80) == kernels(128, 128) == ["keys_1"]
    assert kernels(196, 64) == kernels(256, 64) == ["keys_2"]
    assert kernels(257, 64) == ["prepare", "queries", "keys_2"]
    assert kernels(129, 80) == ["prepare", "queries", "keys_1"]


def test_windows(extension):
    """Two windows at a time, as many blocks as registers allow; 3 of 4 warps."""
    (launch,) = plan(extension, "forward", H100, 64, 80, batch=768, windows=True)
    assert launch == launch | {"kernel": "windows_64", "stages": 2, "blocks": 3 * 132, "threads": 128}
    (launch,) = plan(extension, "forward", H100, 100, 64, batch=768, windows=True)
    assert launch == launch | {"kernel": "windows_128", "threads": 32 * 7}


# ------------------------------------------------------------------------------------------------- who serves a call


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_nothing_to_do(direction, emulated):
    for case in (Case(batch=0, tokens=7), Case(batch=2, tokens=0), Case(lengths=(0, 0))):
        inputs = make(Case(**{**vars(case), "dtype": torch.bfloat16}))
        out = inputs.call("cuda")
        assert out.shape == inputs.q.shape
        if direction == "backward":
            grads = torch.autograd.grad(out, list(inputs.leaves.values()), inputs.dout)
            assert [g.shape for g in grads] == [x.shape for x in inputs.leaves.values()]


@pytest.mark.parametrize(
    ("faster", "served"), [(None, "triton"), ("cuda", "cuda"), ("triton", "triton"), ("composed", "composed")]
)
def test_auto_takes_what_was_measured(faster, served, monkeypatch):
    """Of a GPU, "meta" has all that this looks at."""
    for backend in (cuda, triton):
        monkeypatch.setattr(backend, "unavailable", lambda: None)
        monkeypatch.setattr(backend, "cannot_serve", lambda call: None)
    monkeypatch.setattr(triton, "faster", lambda call: faster)
    assert select.select(call_of(64, 80), "auto") == served


def test_tune_measures_them(emulated, monkeypatch, tmp_path):
    """They are asked beside the others, and taken if they agree with Triton's results and are faster."""
    if not triton.INTERPRETED:
        pytest.skip("a GPU is here: tests/backends/gpu tunes on it")
    from spatial_pe import tuning
    from spatial_pe.backends.triton import tiles

    tile = (tiles.Tile(64, 64, 4, 2),)
    few = {"forward": tile, "query": tile, "key": tile, "window_forward": (None,), "window_backward": (None,)}
    monkeypatch.setattr(tuning, "CANDIDATES", few)
    ran = []

    def clock(runs):
        for key, run in runs.items():
            run()
            ran.append(key)
        return {key: 1.0 if str(key).startswith("cuda") else 2.0 for key in runs}

    problem = tuning.Problem(20, 64, heads=1, dtype="float16", budget=20)

    def row() -> dict:
        rows = tuning.tune(
            [problem], torch.device("cpu"), file=tmp_path / "t.json", clock=clock, workers=0, say=lambda x: None
        )
        (found,) = rows.values()
        return found

    assert row()["faster"] == {"inference": "cuda", "training": "cuda"}
    assert {"cuda, inference", "cuda, training"} <= set(ran)
    # one that is wrong is not
    right = cuda.forward
    monkeypatch.setattr(cuda, "forward", lambda call: [2 * x for x in right(call)])
    found = row()
    assert found["faster"] == {"inference": "triton", "training": "triton"}
    assert (
        found["failed"]
        == [text for text in found["failed"] if text.startswith("cuda: out: a row is off by 1.0e+00")]
        != []
    )


MISSING = "the CUDA kernels are not built: reinstall with nvcc on the PATH"


@pytest.mark.parametrize(
    ("extension_is", "reason"),
    [
        (MISSING, MISSING),
        (SimpleNamespace(devices=lambda: ([], "CUDA driver version is insufficient")), "finds no device .CUDA driver"),
    ],
)
def test_a_library_that_cannot_serve_is_a_reason(extension_is, reason, monkeypatch):
    """No library, and one whose CUDA runtime needs a newer driver than torch's: auto goes on, a forced one says why."""
    monkeypatch.setattr(cuda, "EXTENSION", extension_is)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    cuda._runtime_error.cache_clear()
    try:
        x = torch.randn(1, 4, 2, 64, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=f'backend="cuda" cannot serve this call: .*{reason}'):
            select.select(AttentionCall(x, x, x, None, 1.0, None, None, None), "cuda")
        assert select.select(AttentionCall(x, x, x, None, 1.0, None, None, None), "auto") != "cuda"
    finally:
        cuda._runtime_error.cache_clear()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the launch would succeed")
def test_a_failed_launch_says_what_and_where(tmp_path):
    """The kernel, its grid, its shared memory, the device and what CUDA says of it."""
    source = ROOT / "csrc/cuda"
    program = tmp_path / "launch_test"
    sources = [ROOT / "tests/backends/cuda/launch_test.cu", source / "launch.cu", source / "plan.cpp"]
    command = ["nvcc", "-std=c++17", "-arch=sm_80", "--expt-relaxed-constexpr", "-o", program, *sources]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    ran = subprocess.run([program], capture_output=True, text=True)
    expected = (
        r"CUDA could not launch windows_64 \(head_dim 80\), 396 blocks of 128 threads, 61456 bytes of shared memory "
        r"each, on device 0: .+ \(cudaError\w+\)\n"
    )
    assert re.fullmatch(expected, ran.stdout), ran.stdout


def test_refuses_tokens_too_far_apart():
    q = torch.empty(1, 4, 2, 64, dtype=torch.bfloat16)
    v = torch.empty_strided(q.shape, (0, 2**31, 64, 1), dtype=q.dtype, device="meta")
    assert cuda._too_far(v) and not cuda._too_far(q)


def test_an_unloadable_library_is_a_reason(monkeypatch, tmp_path):
    """A file that is no library: one line, no traceback."""
    import importlib

    real = importlib.import_module

    def refuse(name, *args):
        if name == "spatial_pe._cuda":
            raise ImportError("libcudart.so.99: cannot open shared object file")
        return real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", refuse)
    assert cuda._load() == (
        "the CUDA kernels do not load (libcudart.so.99: cannot open shared object file): reinstall spatial_pe"
    )
