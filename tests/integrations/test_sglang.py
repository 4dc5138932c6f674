# SPDX-License-Identifier: Apache-2.0
"""The plug-in for SGLang: on a module that does what its VisionAttention does; and the installed wheel's interface.

SGLang itself needs a GPU's packages to be imported, so that its class is read here, not run.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spatial_pe.integrations import sglang as plugin

WHEEL = Path(__file__).parents[2] / ".venv" / "sglang" / "sglang" / "srt"
HEADS, DIM, WIDTH = 2, 16, 32


class Backend(nn.Module):
    def forward(self, q, k, v, bsz, seq_len, cu_seqlens=None, softmax_scale=None, **kwargs):
        starts = range(0, bsz * seq_len + 1, seq_len) if cu_seqlens is None else cu_seqlens.tolist()
        found = []
        for start, stop in itertools.pairwise(starts):
            parts = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
            found.append(F.scaled_dot_product_attention(*parts, scale=softmax_scale)[0].transpose(0, 1))
        return torch.cat(found)


class VisionAttention(nn.Module):
    """As SGLang's, of one process."""

    def __init__(self, norm=False):
        super().__init__()
        self.qkv_proj, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qk_normalization, self.qk_normalization_by_head_size = norm, False
        self.customized_position_embedding_applier, self.sinks, self.softmax_scale = None, None, None
        self.head_size, self.qkv_backend = DIM, Backend()

    def forward(
        self,
        x,
        cu_seqlens=None,
        position_embeddings=None,
        rotary_pos_emb_cos=None,
        rotary_pos_emb_sin=None,
        attention_mask=None,
        forward_metadata=None,
        full_attn=True,
        **kwargs,
    ):
        batch, tokens, _ = x.shape
        q, k, v = (y.reshape(batch * tokens, HEADS, DIM) for y in self.qkv_proj(x).chunk(3, -1))
        cos, sin = position_embeddings or (rotary_pos_emb_cos, rotary_pos_emb_sin)
        if cos is not None:
            if cos.size(-1) * 2 == DIM:
                cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
            cos, sin = cos[:, None], sin[:, None]
            q, k = (y * cos + torch.cat([-y[..., DIM // 2 :], y[..., : DIM // 2]], -1) * sin for y in (q, k))
        if self.qk_normalization:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        out = self.qkv_backend.forward(
            q=q,
            k=k,
            v=v,
            bsz=batch,
            seq_len=tokens,
            cu_seqlens=cu_seqlens,
            attention_mask=attention_mask,
            forward_metadata=forward_metadata,
            sequence_lengths=kwargs.get("sequence_lengths"),
            max_seqlen=kwargs.get("max_seqlen"),
            softmax_scale=self.softmax_scale,
        )
        return self.proj(out.reshape(batch, tokens, -1))


def tables(tokens, width):
    angles = torch.randn(tokens, DIM // 2, generator=torch.Generator().manual_seed(1))
    angles = angles if width == DIM // 2 else torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


@pytest.fixture
def calls(monkeypatch):
    seen = []
    original = plugin.rope_attention
    monkeypatch.setattr(plugin, "rope_attention", lambda *a, **k: seen.append((a, k)) or original(*a, **k))
    return seen


PACKED = torch.tensor([0, 5, 6, 12], dtype=torch.int32)


@pytest.mark.parametrize("width", [DIM, DIM // 2])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("batch", "bounds"), [(1, PACKED), (1, None), (3, None)], ids=["packed", "one", "batch"])
def test_the_rotation_is_in_the_attention(width, named, batch, bounds, calls):
    torch.manual_seed(0)
    module, x = VisionAttention(), torch.randn(batch, 12, WIDTH)
    cos, sin = tables(12 * batch, width)  # a row for each token
    given = {"rotary_pos_emb_cos": cos, "rotary_pos_emb_sin": sin} if named else {"position_embeddings": (cos, sin)}
    theirs = module(x, bounds, **given)
    ours = plugin.attend(VisionAttention.forward, module, x, bounds, max_seqlen=6, **given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    ((args, _),) = calls
    assert args[3] is not None
    again = plugin.attend(VisionAttention.forward, module, x, bounds)  # without a rotation: its own backend
    torch.testing.assert_close(again, module(x, bounds))
    assert len(calls) == 1 and isinstance(module.qkv_backend.own, Backend)


@pytest.mark.parametrize(
    "case", ["norm behind", "own function", "mask", "metadata", "sinks", "no rotation", "other bounds", "halves differ"]
)
def test_other_calls_are_sglangs(case, calls):
    torch.manual_seed(0)
    module, x = VisionAttention(norm=case == "norm behind"), torch.randn(1, 12, WIDTH)
    given: dict = {"position_embeddings": tables(12, DIM)}
    bounds = PACKED
    if case == "own function":
        module.customized_position_embedding_applier = print
    elif case == "mask":
        given["attention_mask"] = torch.ones(1, 12, 12)
    elif case == "metadata":
        given["forward_metadata"] = object()
    elif case == "sinks":
        module.sinks, given["full_attn"] = torch.zeros(HEADS), False
    elif case == "no rotation":
        given = {}
    elif case == "halves differ":
        given = {"position_embeddings": (torch.rand(12, DIM), torch.rand(12, DIM))}
    elif case == "other bounds":
        bounds = types.SimpleNamespace(tolist=PACKED.tolist)
    ours = plugin.attend(VisionAttention.forward, module, x, bounds, **given)
    assert torch.equal(ours, module(x, bounds, **given)) and not calls


def hook_registry(monkeypatch):
    """The wheel's registry of hooks, which imports by itself."""
    if not WHEEL.exists():
        pytest.skip("no SGLang: make .venv/sglang")
    spec = importlib.util.spec_from_file_location("hook_registry", WHEEL / "plugins/hook_registry.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", module)
    return module


def test_the_hook_is_registered_once_and_applied(monkeypatch, calls):
    registry = hook_registry(monkeypatch).HookRegistry
    vision = types.ModuleType("sglang.srt.layers.attention.vision")
    vision.VisionAttention = type("VisionAttention", (VisionAttention,), {"forward": VisionAttention.forward})
    for name in ("sglang.srt.layers", "sglang.srt.layers.attention", vision.__name__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, vision.__name__, vision)
    sys.modules["sglang.srt.layers.attention"].vision = vision
    monkeypatch.setenv(plugin.SWITCH, "0")
    plugin.register()
    assert not registry._hooks.get(plugin.TARGET)
    monkeypatch.delenv(plugin.SWITCH)
    plugin.register()
    plugin.register()
    assert len(registry._hooks[plugin.TARGET]) == 1
    registry.apply_hooks()
    torch.manual_seed(0)
    module, x = vision.VisionAttention(), torch.randn(1, 12, WIDTH)
    given = {"position_embeddings": tables(12, DIM)}
    ours = module(x, PACKED, **given)
    assert len(calls) == 1
    torch.testing.assert_close(ours, VisionAttention.forward(module, x, PACKED, **given), rtol=1e-5, atol=1e-6)


def test_the_wheel_has_what_is_hooked():
    """Arguments of VisionAttention.forward, attributes that are read, and what its backends get."""
    if not WHEEL.exists():
        pytest.skip("no SGLang: make .venv/sglang")
    source = (WHEEL / "layers/attention/vision.py").read_text()
    (cls,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "VisionAttention"]
    (forward,) = [n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "forward"]
    names = [a.arg for a in forward.args.args]
    assert names[:7] == [
        "self",
        "x",
        "cu_seqlens",
        "position_embeddings",
        "rotary_pos_emb_cos",
        "rotary_pos_emb_sin",
        "attention_mask",
    ]
    assert set(names[7:]) == {"forward_metadata", "full_attn"} and forward.args.kwarg is not None
    body = ast.unparse(cls)
    for name in ("qk_normalization", "qk_normalization_by_head_size", "customized_position_embedding_applier", "sinks"):
        assert f"self.{name}" in body
    (backend,) = [n for n in ast.walk(forward) if isinstance(n, ast.Call) and "qkv_backend" in ast.unparse(n.func)]
    assert not backend.args
    given = {keyword.arg for keyword in backend.keywords}
    assert {"q", "k", "v", "bsz", "seq_len", "cu_seqlens", "max_seqlen", "softmax_scale", "attention_mask"} <= given
    # the rotation comes before the norm of all heads, and after that of a head
    text = ast.unparse(forward)
    order = [text.index(x) for x in ("_apply_qk_norm_head_size(", "rotary_fn(", "_apply_qk_norm(")]
    assert order == sorted(order)
