# SPDX-License-Identifier: Apache-2.0
"""Whole towers in the engines that users would pick instead of patching, or beside it: torch.compile with and without
freezing, OpenVINO, ONNX Runtime.

Freezing (inductor) and both engines fold weights into constants and pack them for the CPU's matrix products, which
torch's eager linear layers do not. ONNX Runtime has no bfloat16 on the CPU; of OpenVINO bfloat16 is the precision hint,
with inputs in float32.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..._utils.console import first_line

# A tower in bfloat16 differs from itself in another engine by 0.01 to 0.03; a wrong graph by much more.
SAME = 0.08
Forward = Callable[[Any, torch.dtype], Tensor]


class PeerError(Exception):
    """The reason why a peer cannot run a tower."""


class _RecordedError(Exception):
    """Carries the arguments of a call out of a forward."""

    def __init__(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.arguments, self.keywords = args, kwargs


def _recorded(*args: Any, **kwargs: Any) -> Any:
    raise _RecordedError(args, kwargs)


class _Positional(nn.Module):
    """The tower as a function of its tensors: the first of its outputs."""

    def __init__(self, module: nn.Module, names: tuple[str | int, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *tensors: Tensor) -> Tensor:
        args = [x for name, x in zip(self.names, tensors, strict=True) if isinstance(name, int)]
        kwargs = {name: x for name, x in zip(self.names, tensors, strict=True) if isinstance(name, str)}
        return first(self.module(*args, **kwargs))


def first(result: Any) -> Tensor:
    """The first tensor of what a tower returns."""
    while not isinstance(result, Tensor):
        result = result.to_tuple()[0] if hasattr(result, "to_tuple") else result[0]
    return result


def positional(module: nn.Module, forward: Forward, dtype: torch.dtype) -> tuple[_Positional, tuple[Tensor, ...]]:
    """The tower as a function of tensors, and those that ``forward`` calls it with."""
    try:
        forward(_recorded, dtype)
    except _RecordedError as call:
        found: dict[str | int, Tensor] = dict(enumerate(call.arguments)) | call.keywords
    return _Positional(module, tuple(found)).eval(), tuple(found.values())


# --------------------------------------------------------------------------------------------------------- the engines


def compiled(module: nn.Module, forward: Forward, dtype: torch.dtype, threads: int) -> Callable[[], Tensor]:
    """torch.compile."""
    return _compiled(module, forward, dtype, freezing=False)


def frozen(module: nn.Module, forward: Forward, dtype: torch.dtype, threads: int) -> Callable[[], Tensor]:
    """torch.compile with freezing: weights are constants, packed for the CPU."""
    return _compiled(module, forward, dtype, freezing=True)


def _compiled(module: nn.Module, forward: Forward, dtype: torch.dtype, freezing: bool) -> Callable[[], Tensor]:
    import torch._inductor.config as inductor

    torch.compiler.reset()  # of a tower that was compiled before: its frames count against the limit of recompilations
    tower, tensors = positional(copy.deepcopy(module), forward, dtype)
    call = torch.compile(tower)
    with torch.no_grad(), inductor.patch(freezing=freezing):
        call(*tensors)

    def run() -> Tensor:
        with torch.no_grad():
            return call(*tensors)

    return run


def openvino(module: nn.Module, forward: Forward, dtype: torch.dtype, threads: int) -> Callable[[], np.ndarray]:
    """OpenVINO's conversion of the traced tower."""
    import openvino

    if dtype not in (torch.float32, torch.bfloat16):
        raise PeerError(f"no {dtype} on the CPU")
    tower, tensors = positional(copy.deepcopy(module).float(), forward, torch.float32)
    with torch.no_grad(), _silent():
        model = openvino.convert_model(tower, example_input=tensors)
    precision = "bf16" if dtype == torch.bfloat16 else "f32"
    how = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(model, "CPU", how).create_infer_request()
    for index, x in enumerate(tensors):
        request.set_input_tensor(index, openvino.Tensor(np.ascontiguousarray(x.numpy())))

    def run() -> np.ndarray:
        request.infer()
        return request.get_output_tensor(0).data

    return run


def onnxruntime(module: nn.Module, forward: Forward, dtype: torch.dtype, threads: int) -> Callable[[], np.ndarray]:
    """ONNX Runtime on torch.onnx's export."""
    import onnxruntime

    if dtype != torch.float32:
        raise PeerError(f"no {dtype} on the CPU")
    tower, tensors = positional(copy.deepcopy(module), forward, dtype)
    with torch.no_grad(), _silent():
        program = torch.onnx.export(tower, tensors, dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        program.save(f"{folder}/tower.onnx")
        session = onnxruntime.InferenceSession(f"{folder}/tower.onnx", options, providers=["CPUExecutionProvider"])
    data = {i.name: np.ascontiguousarray(x.numpy()) for i, x in zip(session.get_inputs(), tensors, strict=True)}
    return lambda: session.run(None, data)[0]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Converters print their progress and warn of what they trace."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ------------------------------------------------------------------------------------------------------------ the table

# name -> (label, engine, of the patched tower)
PEERS: Mapping[str, tuple[str, Callable[..., Callable[[], Any]], bool]] = {
    "before, compiled": ("torch.compile", compiled, False),
    "after, compiled": ("patched, torch.compile", compiled, True),
    "before, frozen": ("torch.compile, freezing", frozen, False),
    "after, frozen": ("patched, torch.compile, freezing", frozen, True),
    "openvino": ("OpenVINO", openvino, False),
    "onnxruntime": ("ONNX Runtime", onnxruntime, False),
}


def build(
    before: nn.Module, after: nn.Module, forward: Forward, dtype: torch.dtype, threads: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The calls of all peers that compute what the unpatched tower does, and why the others take no part."""
    with torch.no_grad():
        expected = first(forward(before, dtype)).float().numpy()
    calls, refused = {}, {}
    for name, (_, engine, patched) in PEERS.items():
        try:
            call = engine(after if patched else before, forward, dtype, threads)
            found = call()
        except Exception as error:  # an engine may raise anything at a graph that it does not know
            refused[name] = f"{type(error).__name__}: {first_line(error)}"[:200]
            continue
        found = found.detach().float().numpy() if isinstance(found, Tensor) else np.asarray(found, np.float32)
        difference = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        if difference < SAME:
            calls[name] = call
        else:
            refused[name] = f"differs from the tower by {difference:.2g}"
    return calls, refused
