# SPDX-License-Identifier: Apache-2.0
"""What is measured on a GPU, and how it is checked: variants, kernels against float64, layers of towers. No GPU: the
device's clock is replaced by the host's, and kernels by the reference."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import spatial_pe
from benchmarks import gpu_memcheck
from benchmarks.throughput.gpu import cases, check, dry, layers, measure, report, state, variants, warm
from spatial_pe._utils import clock
from spatial_pe.backends import guard
from spatial_pe.backends.triton import backend as triton
from spatial_pe.lab.bench.cases import Inputs


@pytest.mark.parametrize("tokens", [cases.WINDOW, 37])
def test_variants_compute_the_same(tokens):
    checked = dry.agree(cases.shape(2, tokens, 72, heads=2), compiled=False)
    assert {"ours", "auto", "eager-default", "rotary-default"} <= set(checked)


def test_cudnns_rotation_is_refused_with_the_reason():
    with pytest.raises(ImportError, match="cudnn"):
        variants.build("cudnn-rope", Inputs(cases.shape(1, 30, 64, heads=1), torch.bfloat16))


# ------------------------------------------------------------------------------------------------- checks and measures


class HostEvent:
    """torch.cuda.Event, on the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.seconds - self.seconds)


NAMES = ("ours", "off", "auto", "fa3", "eager-cudnn", "eager-flash", "rotary-default")


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A run of two tiny shapes on the CPU: its JSON file, and a function that measures until a time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the shapes are tiny
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    for name in ("_sleep", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "LOAD_MS", 0.1)
    monkeypatch.setattr(measure, "device", lambda: {"name": "a CPU"})
    monkeypatch.setattr(clock, "SAMPLE_MS", 0.01)
    monkeypatch.setattr(measure, "host_microseconds", lambda call: [call() is not None, 2.0])
    shapes = [cases.shape(2, 30, 64, heads=2), cases.shape(2, cases.WINDOW, 80, heads=2)]
    works = [cases.Work(shape, ("rotary", "forward", "backward"), 3, NAMES) for shape in shapes]
    works[1] = replace(works[1], variants=(*NAMES, "eager-loop"))
    monkeypatch.setattr(measure, "plan", lambda name: works)
    out = tmp_path / "step1.json"
    state.save(out, state.new(step=1, machine={}))

    def run(seconds: float = 60.0, plan: str = "table") -> dict:
        measure.Run(out, time.time() + seconds, tmp_path / "now.json", plan).all()
        return state.load(out)

    run.out, run.now = out, tmp_path / "now.json"
    yield run
    torch.set_num_threads(threads)


def test_measures_every_direction_of_every_shape(host):
    content = host(plan="small")
    assert content["not_run"] == []
    assert [row["direction"] for row in content["rows"]] == ["rotary", "forward", "backward"] * 2
    assert {"ours", "SDPA alone", "rotary kernel alone"} <= set(content["host_microseconds"])
    for row in content["rows"]:
        assert all(len(samples) == 3 for samples in row["milliseconds"].values())
        if row["direction"] == "rotary":
            assert set(row["gigabytes_per_second"]) == {"kernel", "eager", "copy"}
        else:
            assert {"ours", "off", "eager-flash", "rotary-default"} <= set(row["tflops"])
            assert {"eager-cudnn", "fa3"} <= set(row["refused"])  # a CPU has neither
            assert all(0 < error < 0.03 for error in row["worst_row"].values())
    windows = content["rows"][-1]
    assert windows["packed"] and "eager-loop" in windows["tflops"]
    report.write(host.out.parent)
    assert "2 windows of 64, 80" in (host.out.parent / "report.md").read_text()


def test_the_file_is_whole_after_every_row(host, monkeypatch):
    seen = []
    save = state.save

    def watched(path, content):
        save(path, content)
        if path == host.out:
            seen.append(len(json.loads(path.read_text())["rows"]))

    monkeypatch.setattr(measure.state, "save", watched)
    host()
    assert sorted(set(seen)) == list(range(7)) and not list(host.out.parent.glob("*.partial"))


def corrupted(attention):
    """One row of one image is 5 % too long: 0.5 % of the norm of all."""

    def run(q, k, v):
        out = attention(q, k, v).clone()
        out.flatten(0, -3)[7, 1] *= 1.05
        return out

    return run


@pytest.mark.parametrize("name", ["ours", "off", "eager-flash"])
def test_a_kernel_that_corrupts_one_row_of_one_image_is_not_timed(host, monkeypatch, name):
    build = variants.build

    def broken(asked, *rest):
        return corrupted(build(asked, *rest)) if asked == name else build(asked, *rest)

    monkeypatch.setattr(variants, "build", broken)
    rows = [row for row in host()["rows"] if row["direction"] == "forward"]
    assert all(row["refused"][name].startswith("ArithmeticError: out: a row is off by ") for row in rows)
    assert not any(name in row["median_ms"] for row in rows)
    assert [bool(measure.wrong(row)) for row in rows] == [name in variants.OURS] * 2


def test_a_kernel_that_gives_other_bits_every_time_is_not_timed(host, monkeypatch):
    build, calls = variants.build, iter(range(10_000))

    def unsteady(name, *rest):
        attention = build(name, *rest)
        if name != "ours":
            return attention
        return lambda q, k, v: attention(q, k, v) * (1 + 0.01 * (next(calls) % 2))

    monkeypatch.setattr(variants, "build", unsteady)
    row = next(row for row in host()["rows"] if row["direction"] == "forward")
    assert row["refused"]["ours"] == "ArithmeticError: out: two runs differ"


def test_one_that_fails_does_not_stop_the_others(host, monkeypatch):
    build = variants.build

    def broken(name, *rest):
        if name == "auto":
            raise RuntimeError("no such kernel\nand a long explanation")
        return build(name, *rest)

    monkeypatch.setattr(variants, "build", broken)
    rows = {(row["packed"], row["direction"]): row for row in host()["rows"]}
    assert rows[False, "forward"]["refused"]["auto"] == "RuntimeError: no such kernel"
    assert "ours" in rows[True, "backward"]["tflops"]


def test_shapes_without_time_are_listed(host):
    content = host(seconds=1.0)
    assert content["rows"] == []
    assert len(content["not_run"]) == 6
    assert "no time for 6" in report.table(content)


def test_a_second_process_goes_on(host):
    content = host()
    first = json.dumps(content["rows"][1])
    del content["rows"][2:]
    content["broken"] = [
        {"size": [2, 2, 30, 64], "direction": "forward", "variant": "ours", "why": "an illegal access"},
        {"size": [2, 2, 64, 80], "direction": "backward", "variant": "off", "why": "never came back"},
    ]
    state.save(host.out, content)
    rows = host()["rows"]
    assert json.dumps(rows[1]) == first  # not measured again
    assert rows[2]["refused"]["ours"] == "an illegal access"
    assert "off" in rows[4]["tflops"]  # windows forward: it was the backward that hung
    assert rows[5]["refused"]["off"] == "never came back"


def test_a_lost_device_ends_the_process_and_names_the_variant(host, monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def build(name, *rest):
        if name == "off":
            monkeypatch.setattr(torch.cuda, "synchronize", lost)
            lost()
        return variants_build(name, *rest)

    variants_build = variants.build
    monkeypatch.setattr(variants, "build", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    until = str(time.time() + 60)
    status = measure.main(["--plan", "table", "--out", str(host.out), "--until", until, "--now", str(host.now)])
    assert status == measure.DEVICE_LOST
    entry = state.load(host.now)
    assert (entry["direction"], entry["variant"]) == ("forward", "off")
    assert "illegal memory access" in entry["error"]


def test_left_out_everywhere_after_two_crashes():
    broken = [
        {"size": [1, 16, tokens, 64], "direction": "forward", "variant": "fa4", "why": "crash"} for tokens in (196, 256)
    ]
    assert state.why_not(broken[:1], [1, 16, 576, 64], "forward", "fa4") is None
    assert "crash" in state.why_not(broken, [1, 16, 576, 64], "forward", "fa4")
    assert state.why_not(broken, [1, 16, 576, 64], "forward", "ours") is None


@pytest.fixture
def checks(monkeypatch, tmp_path):
    """The checks of one backend, which is the reference in place of kernels, on two tiny shapes."""
    from spatial_pe.backends import reference

    monkeypatch.setattr(check, "DEVICE", "cpu")
    monkeypatch.setitem(check.BACKENDS, "cuda", reference)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the shapes are tiny
    out, now = tmp_path / "step1.json", tmp_path / "now.json"
    state.save(out, state.new(step=1))
    shapes = [cases.shape(2, cases.WINDOW, 80, heads=2), cases.shape(2, 30, 64, heads=2)]

    def run() -> list[dict]:
        check.Run("cuda", out, time.time() + 60, now, shapes).all()
        return state.load(out)["checks"]

    run.reference, run.out = reference, out
    yield run
    torch.set_num_threads(threads)


@pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}")
@pytest.mark.skipif(not triton.INTERPRETED, reason="a GPU is here")
def test_every_triton_kernel_is_checked(checks, monkeypatch):
    """In the interpreter, which has no bfloat16."""
    monkeypatch.setattr(check, "DTYPES", {"fp16": torch.float16})
    shapes = [cases.shape(2, cases.WINDOW, 16, heads=2), cases.shape(1, 130, 16, heads=1)]
    check.Run("triton", checks.out, time.time() + 300, checks.out.with_name("now.json"), shapes).all()
    rows = state.load(checks.out)["checks"]
    assert [row["unit"] for row in rows] == ["backward", "forward", "rotate", "angles"] * 2
    assert all(row["wrong"] is None for row in rows)
    names = {kernel for row in rows for kernel in row["kernels"].values()}
    assert names == {"window_backward", "window_forward", "query", "key", "forward", "rotate", "angles"}


@pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}")
@pytest.mark.parametrize("shape", [cases.shape(2, 200, 64, heads=2), cases.shape(3, cases.WINDOW, 80, heads=2)])
def test_what_is_compiled_ahead_is_what_is_launched(shape):
    """The same constants, dtypes and divisibility, from tensors without memory and from those of a measurement."""
    from spatial_pe.backends.triton.plan import plan_backward, plan_forward, plan_rotation

    inputs = Inputs(shape, torch.bfloat16)
    ahead = {warm.specialised(launch) for launch in warm.launches(shape, torch.bfloat16, "hopper")}
    for rotated in (True, False):
        call = inputs.call(rotated)
        forward = plan_forward(call)
        backward = plan_backward(call, *forward.results, inputs.batched_grad)
        assert {warm.specialised(launch) for launch in (*forward.launches, *backward.launches)} <= ahead
    call = inputs.call()
    assert {warm.specialised(x) for x in plan_rotation([call.q, call.k], call.rotary).launches} <= ahead


def test_every_kernel_is_checked_backward_first(checks):
    rows = checks()
    assert [(row["unit"], row["dtype"]) for row in rows[:4]] == [
        (unit, dtype) for dtype in ("bf16", "fp16") for unit in ("backward", "forward")
    ]
    assert all(row["wrong"] is None for row in rows) and len(rows) == 8
    assert set(rows[0]["worst_row"]) == {"dq", "dk", "dv"} and 0 < rows[0]["worst_row"]["dq"] < 0.03
    assert len(checks()) == 8  # a process that is started again repeats nothing


def test_a_wrong_row_of_a_kernel_is_found_and_reported(checks, monkeypatch):
    real = checks.reference.backward

    def backward(call, out, lse, dout):
        dq, dk, dv = real(call, out, lse, dout)
        if call.q.dtype == torch.bfloat16:
            dk[-1, -1, 1] *= 0.85
        return dq, dk, dv

    monkeypatch.setattr(checks.reference, "backward", backward)
    rows = checks()
    wrong = [row for row in rows if row["wrong"]]
    assert [(row["unit"], row["dtype"]) for row in wrong] == [("backward", "bf16")] * 2
    assert all(row["wrong"].startswith("dk: a row is off by ") for row in wrong)
    text = report.checks(rows)
    assert re.search(r"\| cuda \| backward \| bf16 \| 1[45]\.\d", text) and "WRONG, 2x2x64x80: dk" in text
    assert "| cuda | forward | bf16 |" in text and text.count("WRONG") == 2  # both shapes, in one line
    row = {"backend": "triton", "size": [9, 16, 4096, 64], "dtype": "bf16", "unit": "backward"}
    row |= {"worst_row": {"dq": 0.01, "dk": 0.2}, "kernels": {"dq": "query", "dk": "key"}}
    lines = report.checks([row | {"wrong": "dk: a row is off by 2.0e-01 of its norm"}]).splitlines()
    assert lines[-2:] == [
        "| triton | query | bf16 | 1.00% | right |",
        "| triton | key | bf16 | 20.00% | WRONG, 9x16x4096x64: dk: a row is off by 2.0e-01 of its norm |",
    ]
    assert report.checks([row | {"wrong": "never came back"}]).count("WRONG") == 2


def test_what_never_came_back_in_a_check_is_not_measured(checks):
    content = state.load(checks.out)
    entry = {"size": [2, 2, 30, 64], "direction": "backward", "variant": check.name_of("cuda", "backward", "bf16")}
    content["broken"].append({**entry, "why": "did not come back"})
    state.save(checks.out, content)
    assert [row["wrong"] for row in checks() if row["wrong"]] == ["did not come back"]
    assert state.why_not(content["broken"], [2, 2, 30, 64], "backward", "cuda") == "did not come back"


def test_a_row_is_a_token_of_a_head():
    expected = torch.ones(2, 3, 4, 8, dtype=torch.float64)
    x = expected.clone()
    x[1, 2, 3] *= 1.5
    assert guard.worst_row(x, expected) == pytest.approx(0.5)
    x[0, 0, 0, 0] = torch.nan
    assert guard.worst_row(x, expected) != guard.worst_row(x, expected)  # NaN
    zero = torch.zeros(1, 2, 1, 8, dtype=torch.float64)
    assert guard.worst_row(zero, zero) == 0 and guard.worst_row(zero + 1e-9, zero) == float("inf")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_float64_by_heads_is_float64(kv_heads, monkeypatch):
    from spatial_pe.backends.base import AttentionCall

    q, k, v = (torch.randn(2, 9, heads, 16) for heads in (4, kv_heads, kv_heads))
    rotary = spatial_pe.Rotary.from_angles(torch.randn(9, 8))
    call, dout = AttentionCall(q, k, v, rotary, 0.25, None, None, None), torch.randn(2, 9, 4, 16)
    whole = guard.exact(call, dout)
    monkeypatch.setattr(guard, "MOST_SCORES", 81)
    parts = guard.exact(call, dout)
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-12) for name in guard.RESULTS)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = spatial_pe.rope_attention(*leaves, rotary, scale=0.25, backend="composed")
    for name, x in zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout.double()), strict=True):
        assert torch.allclose(whole[name], x, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", gpu_memcheck.CASES, ids=str)
def test_what_the_sanitizer_runs(case, monkeypatch, capsys):
    monkeypatch.setattr(gpu_memcheck, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu_memcheck.once("reference", *case)
    assert capsys.readouterr().out.endswith("done\n")


# --------------------------------------------------------------------------------------------------------------- towers


@pytest.mark.parametrize("name", layers.TOWERS)
def test_a_layer_of_a_tower(name, host, monkeypatch):
    """transformers' classes, a small batch, called without max_seqlen."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(layers, "DEVICE", "cpu")
    monkeypatch.setattr(layers, "DTYPE", torch.float32)
    monkeypatch.setattr(layers, "ROUNDS", 1)
    found = layers.measure(name, lambda: layers.TOWERS[name](scale=1, width=16 * 16))
    assert found["patched"] == 1 and found["differs_by"] < 1e-4
    assert set(found["median_ms"]) == {"forward", "forward+backward"}
    assert "max_seqlen" not in Path(layers.__file__).read_text()
    text = report.layers([found, {"name": "other", "refused": "ImportError: no transformers"}])
    assert found["what"] in text and "not run: ImportError" in text
