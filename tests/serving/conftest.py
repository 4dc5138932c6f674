# SPDX-License-Identifier: Apache-2.0
"""Tests with the real vLLM, in an environment of its own: ``make serving``. Elsewhere there is nothing to collect."""

from __future__ import annotations

import importlib.util
import os

import pytest

HERE = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HERE else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def one_rank():
    """vLLM's parallel layers want a process group and a configuration."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    torch.set_num_threads(2)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method="env://", backend="gloo"
        )
        initialize_model_parallel(1, 1)
        yield
