# SPDX-License-Identifier: Apache-2.0
"""Python threads, forked processes, and memory over many calls."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracles import CPU_KERNELS, Case, make, run, threads
from torch.utils.data import DataLoader, Dataset

from spatial_pe import Rotary, rope_attention

pytestmark = pytest.mark.skipif(not CPU_KERNELS, reason="the compiled extension is missing")

# key heads: 4, 5 (left over and shared with 2 threads), 4 sequences, and lengths of one or several blocks
CASES = [
    Case(batch=2, tokens=150, heads=2, dim=64),
    Case(tokens=260, heads=5, dim=72, dtype=torch.bfloat16),
    Case(lengths=(3, 140, 0, 64, 17), heads=1, dim=40, dtype=torch.float16),
    Case(batch=3, tokens=130, seqlens=(130, 0, 57), heads=2, kv_heads=1, dim=40),
]


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.fixture
def two_threads():
    with threads(2):
        yield


# ------------------------------------------------------------------------------------------------------ Python threads


@pytest.mark.parametrize("omp_threads", [1, 2])
def test_calls_from_several_python_threads(omp_threads):
    """The extension lets go of the GIL, so calls do run at once; each has working memory of its own."""
    with threads(omp_threads):
        problems = [make(case) for case in CASES]
        expected = [run(inputs, "cpu") for inputs in problems]

        def work(i: int) -> bool:
            torch.set_num_threads(omp_threads)  # is kept per Python thread
            return same(run(problems[i % len(problems)], "cpu"), expected[i % len(problems)])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(48), timeout=120))


# ---------------------------------------------------------------------------------------------------------------- fork
# libgomp's workers do not survive a fork: a child that waits for them waits for ever. torch itself does, in operators
# on many elements, so here the child calls rope_attention and nothing else. (With seqlens, which asks torch for zeros,
# on fewer than 32768 elements: from there on torch fills them in parallel.)

forks = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="no safe fork here")


def child_result(function) -> int:
    """Exit status of a forked child, 0 if function returns True; 124 if it hangs."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if function() else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    for _ in range(200):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 124


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forked_child(case, two_threads):
    """After its parent used two threads: forward and backward, the same bits, and the parent goes on with two."""
    inputs = make(case)
    rotary = Rotary.from_angles(inputs.angles.detach())
    leaves = (inputs.q, inputs.k, inputs.v)
    options = {"cu_seqlens": inputs.cu_seqlens, "seqlens": inputs.seqlens, "backend": "cpu"}

    def results() -> list[bytes]:
        out = rope_attention(*leaves, rotary, **options)
        tensors = (out.detach(), *torch.autograd.grad(out, leaves, inputs.dout))
        return [x.view(torch.uint8).numpy().tobytes() for x in tensors]

    expected = results()

    def works() -> bool:
        return torch.get_num_threads() == 2 and all(results() == expected for _ in range(3))

    assert child_result(works) == 0
    assert works()
    assert child_result(lambda: child_result(works) == 0) == 0, "in a child's child"


class Attended(Dataset):
    """Features computed in the worker."""

    def __init__(self, inputs):
        self.qkv = [x.detach() for x in (inputs.q, inputs.k, inputs.v)]
        self.rotary = Rotary.from_angles(inputs.angles.detach())

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        return rope_attention(*self.qkv, self.rotary, scale=0.1 * index, backend="cpu")[0]


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_data_loader_worker(two_threads):
    data = Attended(make(CASES[0]))
    expected = torch.stack([data[i] for i in range(len(data))])
    assert not torch.equal(expected[1], expected[2])
    fork = multiprocessing.get_context("fork")
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=fork, timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)


# -------------------------------------------------------------------------------------------------------------- memory


def resident_megabytes() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc")
def test_memory_does_not_grow():
    """200 calls, forward and backward. The working memory of one leaked each time would be over 100 MB."""
    inputs = make(Case(tokens=130, heads=3, dim=64))

    def calls(count: int) -> None:
        for _ in range(count):
            run(inputs, "cpu")
        gc.collect()

    with threads(1):
        calls(30)  # allocators settle
        before = resident_megabytes()
        calls(200)
    assert resident_megabytes() - before < 8
