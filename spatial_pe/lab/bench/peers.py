# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime and OpenVINO on the CPU: a rotation of q and k, then attention, by their own operators.

They get their preferred layout, (B, N, H D) and (B, H, N, D), and windows as a batch, as neither has packed sequences
on the CPU. bfloat16 is OpenVINO's inference precision hint, with inputs in float32; ONNX Runtime has no bfloat16
attention on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .cases import Inputs


class UnsupportedError(Exception):
    """A call that the peer cannot compute."""


def onnxruntime(inputs: Inputs, threads: int) -> Callable[[], Any]:
    """Build com.microsoft.RotaryEmbedding, twice, then com.microsoft.MultiHeadAttention."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    if inputs.dtype != torch.float32:
        raise UnsupportedError("has no attention in this dtype on the CPU")
    shape, dim = inputs.shape, inputs.shape.head_dim
    size = [shape.batch, shape.tokens, shape.heads * dim]
    cos, sin = (table[: shape.tokens, : dim // 2].numpy() for table in (inputs.cos, inputs.sin))
    positions = np.tile(np.arange(shape.tokens, dtype=np.int64), (shape.batch, 1))
    tables = [("cos", cos), ("sin", sin), ("positions", positions)]
    rotate: dict[str, Any] = {"domain": "com.microsoft", "num_heads": shape.heads, "interleaved": 0}
    nodes = [
        helper.make_node("RotaryEmbedding", [name, "positions", "cos", "sin"], [f"{name}_rotated"], **rotate)
        for name in ("q", "k")
    ]
    heads: dict[str, Any] = {"domain": "com.microsoft", "num_heads": shape.heads}
    nodes.append(helper.make_node("MultiHeadAttention", ["q_rotated", "k_rotated", "v"], ["out"], **heads))
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name in "qkv"],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, size)],
        [numpy_helper.from_array(np.ascontiguousarray(table), name) for name, table in tables],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    data = {name: np.ascontiguousarray(x.reshape(size).numpy()) for name, x in zip("qkv", inputs.qkv, strict=True)}
    return lambda: session.run(None, data)[0]


def openvino(inputs: Inputs, threads: int) -> Callable[[], Any]:
    """Build rotate-half as transformers exports it, which OpenVINO fuses into its own RoPE operator, then its
    scaled_dot_product_attention."""
    import openvino
    from openvino import opset13 as ops

    if inputs.dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError("has no attention in this dtype on the CPU")
    shape, dim = inputs.shape, inputs.shape.head_dim
    size = [shape.batch, shape.heads, shape.tokens, dim]
    cos, sin = (ops.constant(table[: shape.tokens].numpy()[None, None]) for table in (inputs.cos, inputs.sin))
    q, k, v = (ops.parameter(size, np.float32, name=name) for name in "qkv")

    def rotated(x: Any) -> Any:
        a, b = ops.split(x, ops.constant(3), 2).outputs()
        half = ops.concat([ops.multiply(b, ops.constant(np.float32(-1))), a], 3)
        return ops.add(ops.multiply(x, cos), ops.multiply(half, sin))

    model = openvino.Model([ops.scaled_dot_product_attention(rotated(q), rotated(k), v)], [q, k, v], "attention")
    precision = "bf16" if inputs.dtype == torch.bfloat16 else "f32"
    how = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(model, "CPU", how).create_infer_request()
    length = (-1, shape.tokens) if shape.packed else None
    for index, x in enumerate(inputs.qkv):
        dense = x.float() if length is None else x.float().unflatten(0, length)
        request.set_input_tensor(index, openvino.Tensor(np.ascontiguousarray(dense.transpose(1, 2).numpy())))

    def call() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    return call
