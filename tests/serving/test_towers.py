# SPDX-License-Identifier: Apache-2.0
"""Every attention class of vLLM that rotates by ApplyRotaryEmb, and whole towers: with the plug-in and without."""

from __future__ import annotations

import importlib
import statistics
import time
import types
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from spatial_pe.integrations import vllm as plugin

MODELS = "vllm.model_executor.models"
SIZES = {"embed_dim": 64, "num_heads": 4, "projection_size": 64}
SIGLIP = types.SimpleNamespace(
    hidden_size=64, num_attention_heads=4, attention_dropout=0.0, use_rope=True, intermediate_size=64
)
ATTENTION = {
    "qwen2_vl.Qwen2VisionAttention": SIZES,
    "qwen2_5_vl.Qwen2_5_VisionAttention": SIZES,
    "glm4_1v.Glm4vVisionAttention": SIZES,
    "ernie45_vl.Ernie4_5_VisionAttention": SIZES,
    "paddleocr_vl.SiglipAttention": SIZES,
    "cohere_compass.Cohere_VisionAttention": SIZES,
    "exaone4_5.EXAONE4_5_VisionAttention": {**SIZES, "num_kv_heads": 2},
    "keye.KeyeSiglipAttention": {"config": SIGLIP},
    "siglip2navit.Siglip2Attention": {"config": SIGLIP},
    "dots_ocr.DotsVisionAttention": {"config": None, "dim": 64, "num_heads": 4},
    "muse_glimmer.MuseGlimmerVisionAttention": {"hidden_size": 64, "num_heads": 4},
    "kimi_k25_vit.MoonViTEncoderLayer": {"num_heads": 4, "hidden_dim": 64, "mlp_dim": 64},
}


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def prepared(model: nn.Module) -> nn.Module:
    """Random weights, packed as vLLM does after it has loaded them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    for layer in model.modules():
        if getattr(layer, "quant_method", None) is not None:
            layer.quant_method.process_weights_after_loading(layer)
    return model.eval()


def attention(name: str, dtype: torch.dtype) -> nn.Module:
    module, cls = name.split(".")
    with default_dtype(dtype):
        return prepared(getattr(importlib.import_module(f"{MODELS}.{module}"), cls)(**ATTENTION[name]))


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.float() - y.float()).norm() / y.float().norm())


def call(module: nn.Module) -> torch.Tensor:
    """The first input of the plug-in's comparison that the module takes."""
    _, mm = plugin._parts(module) or (None, next(m for m in module.children() if isinstance(m, plugin.Fused)))
    weight = next(module.parameters())
    for inputs in plugin._examples(module, mm, weight):
        try:
            with torch.no_grad():
                return plugin._first(module(**inputs))
        except Exception as failed:
            problem = failed
    raise problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ATTENTION)
def test_each_attention_is_served(name, dtype, monkeypatch):
    module = attention(name, dtype)
    theirs = call(module)
    found = plugin.serve(module)
    print(found)
    assert found == plugin.Served({name.split(".")[1]: 1}, {})
    calls = []
    original = plugin.rope_attention
    monkeypatch.setattr(plugin, "rope_attention", lambda *a, **k: calls.append((a, k)) or original(*a, **k))
    ours = call(module)
    assert difference(ours, theirs) < (1e-5 if dtype == torch.float32 else 0.02)
    (args, kwargs) = calls[-1]
    assert args[3] is not None and args[3].cos.dtype == torch.float32  # the rotation is inside
    assert kwargs["cu_seqlens"].tolist() == list(plugin.LENGTHS)
    assert not plugin.serve(module)  # nothing is left to serve
    plugin.unserve(module)
    assert torch.equal(call(module), theirs) and not module._forward_hooks


def test_what_is_not_served_says_why():
    """MiMo attends by another kernel in its windows; FP8; cuDNN's offsets."""
    module = attention("qwen2_vl.Qwen2VisionAttention", torch.float32)
    module.attn.fp8_enabled = True
    assert plugin.serve(module).refused == {"Qwen2VisionAttention": "it is quantised to FP8"}
    module.attn.fp8_enabled = False
    backend = module.attn.attn_backend
    module.attn.attn_backend = types.SimpleNamespace(name="FLASHINFER")
    assert "byte offsets" in plugin.serve(module).refused["Qwen2VisionAttention"]
    module.attn.attn_backend = backend

    class Windowed(type(module)):
        def forward(self, x, cu_seqlens, rotary_pos_emb_cos, rotary_pos_emb_sin, max_seqlen, full_attn=True):
            return super().forward(x, cu_seqlens, rotary_pos_emb_cos, rotary_pos_emb_sin, max_seqlen)

    module.__class__ = Windowed
    assert plugin.serve(module).refused == {"Windowed": "its forward takes full_attn"}


def test_a_wrong_result_is_noticed(monkeypatch):
    module = attention("qwen2_5_vl.Qwen2_5_VisionAttention", torch.float32)
    theirs = call(module)
    original = plugin.rope_attention
    monkeypatch.setattr(plugin, "rope_attention", lambda q, k, v, rotary, **more: original(q, k, v, None, **more))
    assert "the result differs by" in plugin.serve(module).refused["Qwen2_5_VisionAttention"]
    assert torch.equal(call(module), theirs)


def test_a_rotation_that_gets_lost_raises():
    """The module changes after it was compared: never a result without the rotation."""
    module = attention("qwen2_5_vl.Qwen2_5_VisionAttention", torch.float32)
    plugin.serve(module)
    served = module.attn

    class Other(nn.Module):
        def forward(self, query, key, value, **kwargs):
            return value

    module.attn = Other()
    with pytest.raises(RuntimeError, match="attends by another module"):
        call_with(module, served)

    class Copying(nn.Module):
        def forward(self, query, key, value, **kwargs):
            return served(query.clone(), key.clone(), value, **kwargs)

    module.attn = Copying()
    with pytest.raises(RuntimeError, match="copied between the rotation and the attention"):
        call_with(module, served)


def call_with(module, mm):
    inputs = next(iter(plugin._examples(module, mm, next(module.parameters()))))
    with torch.no_grad():
        return module(**inputs)


def qwen2_5_vl(dtype: torch.dtype, layers: int = 4):
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer

    config = Qwen2_5_VLVisionConfig(
        hidden_size=1280,
        intermediate_size=3420,
        depth=layers,
        num_heads=16,
        out_hidden_size=2048,
        fullatt_block_indexes=[layers - 1],
    )
    with default_dtype(dtype):
        return prepared(Qwen2_5_VisionTransformer(config))


def test_a_tower_at_its_real_width():
    """Four layers on 4,500 tokens: the difference, and the times of both, interleaved."""
    model = qwen2_5_vl(torch.bfloat16)
    patches = torch.randn(4500, 1176, generator=torch.Generator().manual_seed(0)).bfloat16()

    def run():
        with torch.no_grad():
            return plugin._first(model(patches, [[1, 50, 90]]))

    theirs = run()
    assert plugin.serve(model).served == {"Qwen2_5_VisionAttention": 4}
    assert difference(run(), theirs) < 0.02
    seconds: dict = {plugin.unserve: [], plugin.serve: []}
    for _ in range(5):
        for change, taken in seconds.items():
            change(model)
            begin = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begin)
    without, with_it = (statistics.median(taken) for taken in seconds.values())
    print(f"Qwen2.5-VL's tower, 4 layers, 4,500 tokens, bf16: {without / with_it:.2f}x as fast with the plug-in")


def test_the_error_of_tables_in_bfloat16():
    """vLLM rounds cos and sin to bfloat16: the error of an attention over 1,024 tokens, against float64."""
    from spatial_pe import Rotary, rope_attention

    tokens, heads, dim = 1024, 4, 80
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    angles = torch.arange(tokens)[:, None] * 10000.0 ** -(torch.arange(dim // 2) / (dim // 2))
    exact = rope_attention(q, k, v, Rotary(angles.cos().double(), angles.sin().double()))
    errors = []
    for table in (torch.bfloat16, torch.float32):
        cos, sin = (t.to(table).float() for t in (angles.cos(), angles.sin()))
        errors.append(difference(rope_attention(*(x.float() for x in (q, k, v)), Rotary(cos, sin)), exact))
    print(f"relative error with tables in bfloat16 {errors[0]:.1e}, in float32 {errors[1]:.1e}")
    assert errors[0] > 100 * errors[1]
