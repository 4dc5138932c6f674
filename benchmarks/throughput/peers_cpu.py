# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel against ONNX Runtime and OpenVINO, forward.

    python -m benchmarks.throughput.peers_cpu --out benchmarks/results/<device>/peers.json

The peers compute plain attention on tensors in the layout that they like best; ours rotates q and k as well. bfloat16
is OpenVINO's inference precision hint (its inputs stay float32); ONNX Runtime has no bfloat16 attention on the CPU.
Windows are a batch for the peers, as they have no packed sequences on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnx import TensorProto, helper
from openvino import opset13

from benchmarks.throughput.attention_cpu import SHAPES, Case
from benchmarks.timing import interleaved, medians
from spatial_pe.backends import cpu
from spatial_pe.environment import describe


def onnxruntime_attention(batch: int, heads: int, tokens: int, dim: int, threads: int):
    """com.microsoft.MultiHeadAttention on (batch, tokens, heads * dim) float32."""
    shape = [batch, tokens, heads * dim]
    names = ["query", "key", "value"]
    node = helper.make_node("MultiHeadAttention", names, ["out"], domain="com.microsoft", num_heads=heads)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    data = {name: np.random.randn(*shape).astype(np.float32) for name in names}
    return lambda: session.run(None, data)


def openvino_attention(batch: int, heads: int, tokens: int, dim: int, threads: int, precision: str):
    """opset13 scaled_dot_product_attention on (batch, heads, tokens, dim)."""
    shape = [batch, heads, tokens, dim]
    inputs = [opset13.parameter(shape, np.float32, name=name) for name in ("q", "k", "v")]
    model = openvino.Model([opset13.scaled_dot_product_attention(*inputs)], inputs, "attention")
    compiled = openvino.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    )
    request = compiled.create_infer_request()
    data = [openvino.Tensor(np.random.randn(*shape).astype(np.float32)) for _ in inputs]
    request.set_input_tensors(0, data[:1])
    for i, tensor in enumerate(data):
        request.set_input_tensor(i, tensor)
    return request.infer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    result = {"command": " ".join(["python -m benchmarks.throughput.peers_cpu", *sys.argv[1:]]), **describe()}
    result |= {"cpu_features": cpu.FEATURES, "rows": []}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.shapes:
            size = SHAPES[name][:4]
            for dtype in ("bf16", "fp32"):
                case = Case(SHAPES[name], {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
                calls = {"ours": case.forward_calls()["ours"]}
                if dtype == "bf16":
                    calls["openvino"] = openvino_attention(*size, threads, "bf16")
                else:
                    calls["openvino"] = openvino_attention(*size, threads, "f32")
                    calls["onnxruntime"] = onnxruntime_attention(*size, threads)
                rounds = options.rounds if name != "4096" else max(3, options.rounds // 3)
                samples = interleaved(calls, rounds, settle=0.1)
                median = medians(samples)
                rates = {variant: case.flops / seconds / 1e9 for variant, seconds in median.items()}
                best = min(seconds for variant, seconds in median.items() if variant != "ours")
                ahead = best / median["ours"]
                row = {"shape": name, "size": size, "dtype": dtype, "threads": threads, "gflops": rates}
                result["rows"].append(row | {"against_best_peer": ahead, "seconds": samples})
                print(f"{name:>8} {dtype} {threads}t  {rates}  {ahead:.2f}x the best peer", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
