# SPDX-License-Identifier: Apache-2.0
"""Compared variants: a rotation and an attention, as functions of (q, k, v), and our fused kernel.

ours, off                the Triton kernels with and without rotation
cuda, cuda-off           the CUDA kernels, likewise
auto                     the choice of backend="auto"
eager-*                  Hugging Face's towers: rotate-half in float32, then torch's SDPA (default, cuDNN, flash);
                         windows as one batch, which no tower does
eager-loop               the same with a call for each window, as transformers' Qwen2.5-VL does
compiled, compiled-cudnn eager-default and eager-cudnn under torch.compile
rotary-*                 our rotary kernel, then torch's SDPA, or its varlen_attn for windows
flex                     our rotary kernel, then FlexAttention, compiled
fa2, fa3, fa4            our rotary kernel, then flash-attn's attention, its varlen form for windows
cudnn-rope               cuDNN's own rotation and attention in one graph, forward of dense calls
"""

from __future__ import annotations

import importlib

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.attention import SDPBackend

import spatial_pe
from spatial_pe.lab.bench.cases import Inputs
from spatial_pe.lab.bench.variants import Attention, Call, rotate, sdpa, timed, windows

# name -> backend
OURS = {"ours": "triton", "off": "triton", "cuda": "cuda", "cuda-off": "cuda", "auto": "auto"}
PLAIN = ("off", "cuda-off")  # compute attention without rotation
OUR_KERNELS = ("ours", "off", "cuda", "cuda-off")  # deterministic; others' backward need not be
FLASH_ATTN = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
SDPA = {"default": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# of cuDNN itself, by its front end's package
OLDEST_CUDNN_THAT_ROTATES = 92400

# a compiled backward may reuse saved tensors, and then runs only once: "backward" runs it many times
torch._functorch.config.donated_buffer = False


def build(name: str, inputs: Inputs, compiler: str = "inductor") -> Attention:
    """Build the variant for these inputs. Raise ImportError if a package is missing."""
    if name in OURS:
        return _fused(name, inputs)
    if name == "cudnn-rope":
        return _cudnn(inputs)
    rotation, _, core = name.partition("-")
    if rotation == "eager":
        attend = windows(inputs) if core == "loop" else sdpa(inputs, SDPA[core])
        return lambda q, k, v: attend(*rotate(q, k, inputs.cos, inputs.sin), v)
    if rotation == "compiled":
        return torch.compile(build(f"eager-{core or 'default'}", inputs), backend=compiler, dynamic=False)
    if rotation == "flex":
        attend = _flex(inputs, compiler)
    elif rotation in FLASH_ATTN:
        attend = _flash_attn(inputs, FLASH_ATTN[rotation])
    else:
        attend = _varlen(inputs) if core == "varlen" else sdpa(inputs, SDPA[core])
    return lambda q, k, v: attend(*spatial_pe.apply_rotary_qk(q, k, inputs.rotary), v)


def _fused(name: str, inputs: Inputs) -> Attention:
    rotary = None if name in PLAIN else inputs.rotary
    backend = OURS[name] if inputs.device == "cuda" else "auto"
    bounds, longest = inputs.cu_seqlens, inputs.max_seqlen
    return lambda q, k, v: spatial_pe.rope_attention(
        q, k, v, rotary, cu_seqlens=bounds, max_seqlen=longest, backend=backend
    )


def _varlen(inputs: Inputs) -> Attention:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = inputs.cu_seqlens, inputs.max_seqlen
    return lambda q, k, v: varlen_attn(q, k, v, bounds, bounds, longest, longest)


def _flex(inputs: Inputs, compiler: str) -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    packed, length = inputs.shape.packed, inputs.shape.tokens
    compiled = torch.compile(flex_attention, backend=compiler, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if packed:
            q, k, v = (x.unflatten(0, (-1, length)) for x in (q, k, v))
        out = compiled(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).contiguous()
        return out.flatten(0, 1) if packed else out

    return attend


def _flash_attn(inputs: Inputs, module: str) -> Attention:
    package = importlib.import_module(module)
    bounds, longest = inputs.cu_seqlens, inputs.max_seqlen
    if bounds is None:
        attention, options = package.flash_attn_func, {}
    else:
        lengths = {f"cu_seqlens_{x}": bounds for x in "qk"} | {f"max_seqlen_{x}": longest for x in "qk"}
        attention, options = package.flash_attn_varlen_func, lengths

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out  # some releases return lse too

    return attend


def _cudnn(inputs: Inputs) -> Attention:
    """Build a cuDNN graph, which computes cos and sin from angles itself. Not run yet: needs cuDNN 9.24."""
    import cudnn

    if not hasattr(cudnn.pygraph, "rope") or cudnn.backend_version() < OLDEST_CUDNN_THAT_ROTATES:
        raise ImportError(f"cuDNN {cudnn.backend_version()} does not rotate: needs 9.24 and its front end of 1.24.1")
    if inputs.shape.packed:
        raise ValueError("cuDNN's rotation has no packed sequences")
    q, k, v = (x.transpose(1, 2) for x in inputs.qkv)
    angles = torch.zeros(inputs.shape.tokens, 1, 1, inputs.shape.head_dim, device=inputs.device)
    angles[:, 0, 0, : inputs.shape.head_dim // 2] = torch.atan2(inputs.rotary.sin, inputs.rotary.cos)[0, :, 0]
    kind = cudnn.data_type.BFLOAT16 if q.dtype == torch.bfloat16 else cudnn.data_type.HALF
    wide = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(intermediate_data_type=wide, compute_data_type=wide)
    rotated_out = [torch.empty_like(x) for x in (q, k)]
    out = torch.empty(inputs.qkv[0].shape, device=inputs.device, dtype=q.dtype).transpose(1, 2)
    nodes = [graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=kind) for x in (q, k, v)]
    nodes.append(graph.tensor(dim=list(angles.shape), stride=list(angles.stride()), data_type=wide))
    rotated = [graph.rope(input=node, freqs=nodes[3]) for node in nodes[:2]]
    result, _ = graph.sdpa(
        q=rotated[0], k=rotated[1], v=nodes[2], is_inference=True, attn_scale=inputs.shape.head_dim**-0.5
    )
    for node, x in zip((*rotated, result), (*rotated_out, out), strict=True):
        node.set_output(True).set_data_type(kind).set_dim(list(x.shape)).set_stride(list(x.stride()))
    graph.build([cudnn.heur_mode.A])
    handle = cudnn.create_handle()
    workspace = torch.empty(max(1, graph.get_workspace_size()), device=inputs.device, dtype=torch.uint8)
    uids = [node.get_uid() for node in (*nodes, *rotated, result)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("measured in the forward only")
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        tensors = (q, k, v, angles, *rotated_out, out)
        pointers = {uid: x.data_ptr() for uid, x in zip(uids, tensors, strict=True)}
        graph.execute(pointers, workspace.data_ptr(), handle)
        return out.transpose(1, 2)

    return attend


# --------------------------------------------------------------------------------------------------------- directions


def call(function: Attention, inputs: Inputs, direction: str) -> Call:
    return timed(function, inputs.qkv, inputs.leaves, inputs.grad, direction)


def rotations(inputs: Inputs) -> dict[str, Call]:
    """Return the rotation alone, and a copy of as many bytes, the lower limit for all of them."""
    q, k, _ = inputs.qkv
    source = torch.randn(2, q.numel(), device=inputs.device, dtype=q.dtype)
    target = torch.empty_like(source)
    return {
        "kernel": lambda: spatial_pe.apply_rotary_qk(q, k, inputs.rotary),
        "eager": lambda: rotate(q, k, inputs.cos, inputs.sin),
        "copy": lambda: target.copy_(source),
    }


def rotation_bytes(inputs: Inputs) -> int:
    """Return the bytes of q and k read and written once, and of the tables, at most a thirty-second of that."""
    q = inputs.qkv[0]
    tables = inputs.rotary.cos.nbytes + inputs.rotary.sin.nbytes
    return 4 * q.numel() * q.itemsize + tables
