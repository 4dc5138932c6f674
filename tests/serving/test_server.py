# SPDX-License-Identifier: Apache-2.0
"""A vLLM server with a tiny Qwen2.5-VL, asked over HTTP with images of several sizes: the same tokens with the plug-in
and without, and the time until the first one."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points

import numpy as np
import pytest
import tiny
from PIL import Image

SIZES = [(224, 224), (300, 420), (700, 980), (56, 840)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write(path)
    return path


@contextmanager
def server(model, log, **environment: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO", **environment}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--load-format", "dummy", "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
    command += ["--limit-mm-per-prompt", '{"image": 2, "video": 0}', "--seed", "0", "--served-model-name", "tiny"]
    command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            wait_for(port, process, log)
            yield port
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=30)
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(port: int, process: subprocess.Popen, log) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def picture(height: int, width: int) -> str:
    pixels = np.random.default_rng(height).random((height, width, 3)) * 255
    held = io.BytesIO()
    Image.fromarray(pixels.astype("uint8")).save(held, format="PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def ask(port: int, *sizes: tuple[int, int], tokens: int = 8) -> tuple[str, float]:
    """Return the answer, and the seconds that it took."""
    images = [{"type": "image_url", "image_url": {"url": picture(*size)}} for size in sizes]
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [*images, {"type": "text", "text": "where?"}]}],
        "max_tokens": tokens,
        "temperature": 0,
        "logprobs": True,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    begin = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as answer:
        found = json.load(answer)["choices"][0]
    return [entry["token"] for entry in found["logprobs"]["content"]], time.perf_counter() - begin


def answers(model, log, **environment: str):
    """Return the tokens for each question, the seconds until the first token of the largest image, and the log."""
    with server(model, log, **environment) as port:
        said = [ask(port, size)[0] for size in SIZES] + [ask(port, SIZES[0], SIZES[2])[0]]
        seconds = [ask(port, SIZES[2], tokens=1)[1] for _ in range(5)]
    return said, statistics.median(seconds), log.read_text()


def test_the_entry_point_is_there():
    (found,) = entry_points(group="vllm.general_plugins", name="spatial_pe")
    assert found.load().__name__ == "register"


def test_a_server_says_the_same(model, tmp_path):
    theirs, without, quiet = answers(model, tmp_path / "own.log", SPATIAL_PE_VLLM="0")
    ours, with_it, log = answers(model, tmp_path / "spatial_pe.log")
    assert "Qwen2_5_VisionAttention rotate inside of their attention" in log, log[-3000:]
    assert "rotate inside" not in quiet
    assert ours == theirs and all(len(said) == 8 for said in ours)
    print(f"a tiny Qwen2.5-VL in float32, 700 x 980 pixels, first token: {without / with_it:.2f}x as fast")


def test_the_switch_of_vllm_is_respected(model, tmp_path):
    with server(model, tmp_path / "none.log", VLLM_PLUGINS="") as port:
        ask(port, SIZES[0], tokens=1)
    assert "rotate inside" not in (tmp_path / "none.log").read_text()
