# SPDX-License-Identifier: Apache-2.0
"""Bad input raises before any kernel runs, and the message names the argument and what it must be."""

from __future__ import annotations

import re

import pytest
import torch

from spatial_pe import PatchGrid, Rotary, apply_rotary, backends, rope_attention
from spatial_pe.backends import cpu, reference
from spatial_pe.backends.triton import backend as triton
from spatial_pe.ops import composed

BACKENDS = ["auto", *(name for name, missing in backends() if missing is None)]


def qkv(*shape, kv_heads=None, **options):
    shape = shape or (2, 10, 4, 16)
    kv_shape = (*shape[:-2], kv_heads or shape[-2], shape[-1])
    return [torch.randn(s, **options) for s in (shape, kv_shape, kv_shape)]


def table(tokens=10, pairs=8, heads=1, batch=1, **options):
    return Rotary.from_angles(torch.randn(batch, tokens, heads, pairs, **options))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """A kernel that is reached is a failure of its own."""

    def reached(*args, **kwargs):
        raise AssertionError("a kernel ran")

    if not cpu.unavailable():
        monkeypatch.setattr(cpu.EXTENSION, "forward", reached)
    if not triton.unavailable():
        from spatial_pe.backends.triton.launch import Launch

        monkeypatch.setattr(Launch, "run", reached)
    monkeypatch.setattr(composed, "_sdpa", reached)
    monkeypatch.setattr(reference, "_scores", reached)


def refuses(error, message, *args, backend="auto", **kwargs):
    with pytest.raises(error, match=message):
        rope_attention(*args, backend=backend, **kwargs)


def test_the_fixture_sees_kernels():
    for backend in BACKENDS:
        refuses(AssertionError, "a kernel ran", *qkv(), table(), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
class TestTensors:
    """For every backend, as checks come before the choice of one."""

    def test_not_a_tensor(self, backend):
        q, k, v = qkv()
        refuses(TypeError, r"^k must be a torch.Tensor, got ndarray", q, k.numpy(), v, backend=backend)
        refuses(TypeError, r"^v must be a torch.Tensor, got NoneType", q, k, None, backend=backend)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
    def test_dtype(self, backend, dtype):
        q, k, v = (x.to(dtype) for x in qkv())
        refuses(TypeError, rf"^q must be float32, float16, bfloat16 or float64, got {dtype}", q, k, v, backend=backend)

    def test_mixed_dtypes(self, backend):
        q, k, v = qkv()
        message = r"^q, k and v must share a dtype, got q torch.float32, v torch.float16"
        refuses(TypeError, message, q, k, v.half(), backend=backend)

    def test_devices(self, backend):
        q, k, v = qkv()
        refuses(ValueError, r"^q, k and v must be on one device, got q on cpu, k on meta", q, k.to("meta"), v,
                backend=backend)  # fmt: skip
        refuses(ValueError, r"^rotary is on meta, q on cpu: use rotary.to\('cpu'\)", q, k, v,
                table(device="meta"), backend=backend)  # fmt: skip
        message = r"^seqlens is on meta, q on cpu: they must be on one device"
        refuses(ValueError, message, q, k, v, seqlens=int32(1, 2).to("meta"), backend=backend)

    def test_last_dimension_not_contiguous(self, backend):
        q, k, v = qkv(2, 10, 16, 4)
        message = r"^k must be contiguous in its last dimension \(stride 1\), got strides .*call k.contiguous\(\)"
        refuses(ValueError, message, *(q.mT.contiguous(), k.mT, v.mT), backend=backend)
        refuses(ValueError, r"^q must be contiguous", *(x[..., ::2] for x in qkv()), backend=backend)
        refuses(
            ValueError, r"^q must be contiguous", *(x[..., :1].expand(2, 10, 4, 16) for x in qkv()), backend=backend
        )

    def test_number_of_dimensions(self, backend):
        q, k, v = qkv()
        layout = re.escape("(batch, tokens, heads, head_dim)")
        refuses(ValueError, rf"^q must be {layout}, got shape \(10, 4, 16\): packed tensors need cu_seqlens",
                q[0], k[0], v[0], backend=backend)  # fmt: skip
        refuses(ValueError, rf"^q must be {layout}, got shape \(4, 16\)$", q[0, 0], k[0, 0], v[0, 0], backend=backend)
        refuses(ValueError, r"^v must be .*, got shape \(10, 4, 16\)", q, k, v[0], backend=backend)
        refuses(ValueError, r"^q must be \(total_tokens, heads, head_dim\), got shape \(2, 10, 4, 16\)$", q, k, v,
                cu_seqlens=int32(0, 10), backend=backend)  # fmt: skip

    def test_shapes_that_do_not_fit(self, backend):
        q, k, v = qkv()
        refuses(ValueError, r"^k and v must have the same shape, got \(2, 10, 4, 16\) and \(2, 9, 4, 16\)",
                q, k, v[:, :9], backend=backend)  # fmt: skip
        refuses(ValueError, r"^q and k must have the same batch", q[:1], k, v, backend=backend)
        refuses(ValueError, r"^q and k must have the same head_dim, got 16 and 8",
                q, *qkv(2, 10, 4, 8)[1:], backend=backend)  # fmt: skip

    @pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (2, 4)])
    def test_head_counts(self, backend, heads, kv_heads):
        message = rf"^the number of key heads must divide the number of query heads, got {kv_heads} and {heads}"
        refuses(ValueError, message, *qkv(2, 10, heads, 16, kv_heads=kv_heads), backend=backend)

    def test_no_heads_no_channels(self, backend):
        refuses(ValueError, r"^the number of key heads must divide", *qkv(2, 10, 0, 16), backend=backend)
        refuses(ValueError, r"^head_dim must be at least 1, got 0", *qkv(2, 10, 4, 0), backend=backend)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
    def test_scale(self, backend, scale):
        refuses(ValueError, rf"^scale must be a finite number, got {scale}", *qkv(), scale=scale, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
class TestRotary:
    def test_not_a_rotary(self, backend):
        refuses(TypeError, r"^rotary must be a spatial_pe.Rotary or None, got Tensor", *qkv(), torch.randn(10, 8),
                backend=backend)  # fmt: skip

    def test_number_of_tokens(self, backend):
        refuses(ValueError, r"^rotary has 9 tokens, q has 10: did you forget prefix=1\?$", *qkv(), table(9),
                backend=backend)  # fmt: skip
        refuses(ValueError, r"^rotary has 11 tokens, q has 10$", *qkv(), table(11), backend=backend)
        refuses(ValueError, r"^rotary has 3 tokens, q has 25$", *qkv(2, 25, 4, 16), table(3), backend=backend)
        refuses(ValueError, r"^rotary has 25 tokens, q has 4: is q \(batch, heads, tokens, head_dim\)\? Pass q",
                *qkv(2, 4, 25, 16), table(25), backend=backend)  # fmt: skip
        refuses(ValueError, r"^rotary has 10 tokens, q has 12: did you forget prefix=2", *qkv(12, 4, 16), table(10),
                cu_seqlens=int32(0, 12), backend=backend)  # fmt: skip

    def test_too_many_channels(self, backend):
        message = r"^rotary rotates 18 channels, q has head_dim 16: R must be <= D"
        refuses(ValueError, message, *qkv(), table(pairs=9), backend=backend)

    def test_heads_and_batch(self, backend):
        refuses(
            ValueError, r"^rotary has 3 heads, q has 4: it must have 1 or 4", *qkv(), table(heads=3), backend=backend
        )
        refuses(
            ValueError, r"^rotary has batch 3, q has 2: it must have 1 or 2", *qkv(), table(batch=3), backend=backend
        )
        refuses(ValueError, r"^rotary has a table per head, which needs as many key heads as query heads, got 2 and 4",
                *qkv(kv_heads=2), table(heads=4), backend=backend)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
class TestSequences:
    packed = (10, 4, 16)

    def refuses(self, error, message, cu_seqlens, backend):
        refuses(error, message, *qkv(*self.packed), table(), cu_seqlens=cu_seqlens, backend=backend)

    def test_cu_seqlens_values(self, backend):
        self.refuses(ValueError, r"^cu_seqlens must start at 0, got 1$", int32(1, 10), backend)
        self.refuses(ValueError, r"^cu_seqlens must end at the number of tokens, 10, got 9$", int32(0, 9), backend)
        self.refuses(ValueError, r"^cu_seqlens must end at the number of tokens, 10, got 11$", int32(0, 11), backend)
        self.refuses(
            ValueError, r"^cu_seqlens must not decrease, got 6 then 4 at entry 2$", int32(0, 6, 4, 10), backend
        )
        self.refuses(ValueError, r"^cu_seqlens must not decrease, got 20 then 10", int32(0, 20, 10), backend)

    def test_cu_seqlens_itself(self, backend):
        self.refuses(TypeError, r"^cu_seqlens must be int32, got torch.int64: use cu_seqlens.int\(\)",
                     torch.tensor([0, 10]), backend)  # fmt: skip
        self.refuses(TypeError, r"^cu_seqlens must be int32, got torch.float32", torch.tensor([0.0, 10.0]), backend)
        self.refuses(TypeError, r"^cu_seqlens must be an int32 torch.Tensor, got list", [0, 10], backend)
        self.refuses(
            ValueError, r"^cu_seqlens must have one dimension, got shape \(1, 2\)", int32(0, 10)[None], backend
        )
        self.refuses(ValueError, r"^cu_seqlens must have sequences \+ 1 entries, got 1", int32(10), backend)
        self.refuses(ValueError, r"^cu_seqlens must have sequences \+ 1 entries, got 0", int32(), backend)

    def test_seqlens(self, backend):
        for lengths, error, message in [
            (int32(10, 11), ValueError, r"^seqlens must lie between 0 and the 10 tokens of q, got 11 for sample 1$"),
            (int32(-1, 10), ValueError, r"^seqlens must lie between 0 and the 10 tokens of q, got -1 for sample 0$"),
            (int32(10), ValueError, r"^seqlens must have an entry for each of the 2 samples, got 1$"),
            (torch.tensor([1, 2]), TypeError, r"^seqlens must be int32, got torch.int64: use seqlens.int\(\)"),
            ((1, 2), TypeError, r"^seqlens must be an int32 torch.Tensor, got tuple"),
            (int32(1, 2)[:, None], ValueError, r"^seqlens must have one dimension, got shape \(2, 1\)"),
        ]:
            refuses(error, message, *qkv(), table(), seqlens=lengths, backend=backend)

    def test_both(self, backend):
        message = r"^pass cu_seqlens \(packed sequences\) or seqlens \(padded batch\), not both"
        refuses(ValueError, message, *qkv(10, 4, 16), cu_seqlens=int32(0, 10), seqlens=int32(10), backend=backend)


class TestBackend:
    def test_unknown(self):
        names = r"\['cpu', 'cuda', 'triton', 'composed', 'reference'\]"
        message = f"""^backend must be "auto" or one of {names}, got 'cpuu'"""
        refuses(ValueError, message, *qkv(), backend="cpuu")

    @pytest.mark.parametrize("dim", [4, 8, 12, 60, 264])
    def test_cpu_head_dim(self, dim):
        message = rf'^backend="cpu" cannot serve this call: head_dim is {dim}: must be a multiple of 8 from 16 to 256$'
        refuses(ValueError, message, *qkv(1, 5, 2, dim), backend="cpu")

    def test_cpu_dtype(self):
        message = r'^backend="cpu" cannot serve this call: no torch.float64 kernel: float32, bfloat16 and float16 only$'
        refuses(ValueError, message, *qkv(dtype=torch.float64), backend="cpu")

    def test_cpu_device(self):
        message = r'^backend="cpu" cannot serve this call: q is on meta: this backend runs on the CPU$'
        refuses(ValueError, message, *qkv(device="meta"), backend="cpu")

    def test_cpu_missing(self, monkeypatch):
        monkeypatch.setattr(cpu, "EXTENSION", "the compiled extension is missing (no compiler)")
        refuses(ValueError, r'^backend="cpu" cannot serve this call: the compiled extension is missing', *qkv(),
                backend="cpu")  # fmt: skip
        assert dict(backends())["cpu"] == "the compiled extension is missing (no compiler)"
        assert dict(backends())["composed"] is None
        # and auto goes on without it
        refuses(AssertionError, "a kernel ran", *qkv())


def test_auto_serves_what_the_kernels_cannot(monkeypatch):
    monkeypatch.undo()
    q, k, v = qkv(1, 5, 2, 12, dtype=torch.float64)
    expected = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) / 12**0.5, -1) @ v.transpose(1, 2)
    torch.testing.assert_close(rope_attention(q, k, v).transpose(1, 2), expected)


def test_nan_in_a_table_is_found_when_it_is_made():
    angles = torch.zeros(10, 8)
    angles[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^cos holds NaN or Inf: check the coordinates and frequencies"):
        Rotary.from_angles(angles)
    with pytest.raises(ValueError, match=r"^sin holds NaN or Inf"):
        Rotary(torch.ones(10, 8), torch.ones(10, 8) / 0)


def test_the_hint_helps():
    """What the message about prefix=1 suggests is a call that works up to the kernel."""
    q, k, v = qkv(1, 17, 2, 16)
    angles = torch.randn(PatchGrid(4, 4, prefix=1).num_tokens, 8)
    refuses(AssertionError, "a kernel ran", q, k, v, Rotary.from_angles(angles))


def test_scale_that_would_want_a_gradient():
    q = torch.randn(1, 4, 1, 16)
    with pytest.raises(TypeError, match="scale must be a number, got a Tensor: multiply q by it"):
        rope_attention(q, q, q, scale=torch.tensor(0.3, requires_grad=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_what_cannot_be_rotated(dtype):
    rotary = Rotary.from_angles(torch.randn(4, 8))
    x = torch.ones(1, 4, 1, 16, dtype=dtype)
    with pytest.raises(TypeError, match=f"x must be a floating point tensor, got {dtype}"):
        apply_rotary(x, rotary)


def test_layouts_that_have_cu_seqlens_instead():
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 16), torch.randn(5, 2, 16)], layout=torch.jagged)
    for x in (nested, torch.randn(1, 4, 1, 16).to_sparse()):
        with pytest.raises(TypeError, match=r"q must be a dense \(strided\) tensor, got .*: pass sequences"):
            rope_attention(x, x, x)


@pytest.mark.parametrize("value", [7.0, "7", torch.tensor(7)])
def test_max_seqlen_is_an_int(value):
    q = torch.randn(7, 1, 16)
    with pytest.raises(TypeError, match=r"max_seqlen must be an int or None, got .*: use int\(max_seqlen\)"):
        rope_attention(q, q, q, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32), max_seqlen=value)
