# SPDX-License-Identifier: Apache-2.0
"""Encodings that are cast, moved and copied, and coordinates far from 0."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spatial_pe import encodings, rope_attention
from spatial_pe.conventions import convention
from spatial_pe.encodings import AxialRoPE, MixedRoPE
from spatial_pe.grid import PatchGrid
from spatial_pe.rotary import Rotary

GRID = PatchGrid(12, 16)


CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(torch.bfloat16),
    "to another's": lambda m: m.to(torch.empty(0, dtype=torch.float16)),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.bfloat16),
    "float8": lambda m: m.to(torch.float8_e4m3fn),
    "twice": lambda m: m.half().bfloat16(),
    "by way of float64": lambda m: m.double().half(),
}


def learned(kind: str) -> AxialRoPE | MixedRoPE:
    """An encoding whose parameter has values that bfloat16 and float16 round."""
    encoding = AxialRoPE(16, strength=1.0) if kind == "strength" else MixedRoPE(16, 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoding.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    return encoding


def parameter_of(encoding: AxialRoPE | MixedRoPE) -> torch.nn.Parameter:
    (parameter,) = encoding.parameters()
    return parameter


def assert_same_table(a: Rotary, b: Rotary) -> None:
    assert torch.equal(a.cos, b.cos) and torch.equal(a.sin, b.sin)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "dinov3"])
def test_frequencies_survive_a_cast_to_half_precision(name, cast):
    encoding = convention(name, 64)
    before = encoding(GRID)
    model = CASTS[cast](torch.nn.Sequential(torch.nn.Linear(2, 2), encoding))
    assert model[0].weight.dtype != torch.float32
    assert encoding.frequencies.dtype == torch.float32
    assert_same_table(encoding(GRID), before)


@pytest.mark.parametrize("swap", [False, True], ids=["set data", "swap"])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", ["strength", "mixed"])
def test_learned_values_survive_a_cast_to_half_precision(kind, cast, swap):
    """The parameter an optimizer holds is still the module's, with its values, and its gradient is as it was."""
    encoding = learned(kind)
    parameter, before = parameter_of(encoding), copy.deepcopy(encoding)
    parameter.grad = torch.rand(parameter.shape)
    gradient = parameter.grad.clone()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), encoding)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        CASTS[cast](model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight.dtype != torch.float32
    assert parameter_of(encoding) is parameter and parameter.dtype == parameter.grad.dtype == torch.float32
    assert torch.equal(parameter, parameter_of(before)) and torch.equal(parameter.grad, gradient)
    assert_same_table(encoding(GRID), before(GRID))


def test_a_cast_that_overwrites_parameters():
    encoding, before = learned("mixed"), learned("mixed")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        encoding.bfloat16()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert_same_table(encoding(GRID), before(GRID))


def test_what_a_subclass_adds_is_cast():
    class Gated(MixedRoPE):
        def __init__(self):
            super().__init__(16, 2)
            self.gate = torch.nn.Linear(2, 2)

    gated = Gated().bfloat16()
    assert gated.gate.weight.dtype == torch.bfloat16 and gated.frequencies.dtype == torch.float32


@pytest.mark.parametrize("kind", ["strength", "mixed"])
def test_copies_of_a_model_in_half_precision(kind):
    encoding = learned(kind)
    before = encoding(GRID)
    encoding.bfloat16()
    for again in (copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))):
        assert parameter_of(again).dtype == torch.float32
        assert_same_table(again.half()(GRID), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["strength", "mixed"])
def test_a_checkpoint_in_half_precision_is_loaded_as_float32(kind, assign):
    saved = {name: value.bfloat16() for name, value in learned(kind).state_dict().items()}
    (name,) = saved
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), learned(kind))
    state = {"0.weight": torch.zeros(2, 2, dtype=torch.bfloat16), f"1.{name}": saved[name]}
    model.load_state_dict(state, assign=assign)
    assert parameter_of(model[1]).dtype == torch.float32 and parameter_of(model[1]).requires_grad
    assert torch.equal(parameter_of(model[1]), saved[name].float())
    assert model[0].weight.dtype == (torch.bfloat16 if assign else torch.float32)
    assert state[f"1.{name}"].dtype == torch.bfloat16  # the caller's
    model[1](GRID)


@pytest.mark.parametrize("kind", ["strength", "mixed"])
def test_values_that_were_rounded_past_the_module_are_refused(kind):
    """``parameter.data = ...`` tells the module nothing; accelerate, peft and FSDP do it."""
    encoding = learned(kind)
    parameter = parameter_of(encoding)
    parameter.data = parameter.data.bfloat16()
    name = "strength" if kind == "strength" else "frequencies"
    with pytest.raises(TypeError, match=rf"spatial_pe: \w+\.{name} is torch\.bfloat16 .*fully_shard.*\.float\(\)"):
        encoding(GRID)
    with pytest.raises(TypeError, match=r"is torch\.float16"):
        torch.func.functional_call(encoding, {name: parameter.data.half()}, (GRID,))
    for move in (lambda m: m.to("cpu"), lambda m: m.bfloat16(), copy.deepcopy):  # none of them brings the values back
        with pytest.raises(TypeError, match="spatial_pe"):
            move(encoding)(GRID)
    encoding.float()(GRID)  # accepted by hand


def test_fixed_frequencies_that_were_rounded_past_the_module_are_made_again():
    """FSDP1 with ``buffer_dtype`` sets the data of buffers."""
    for encoding in (AxialRoPE(16), AxialRoPE(16, frequency="period", period_range=(0.5, 90.0), axis_order="wh")):
        before = encoding(GRID)
        encoding.frequencies.data = encoding.frequencies.data.bfloat16()
        assert_same_table(encoding(GRID), before)
        assert_same_table(encoding.float()(GRID), before)


def test_double_and_back():
    for encoding in (AxialRoPE(16), learned("strength"), learned("mixed")):
        before = {name: value.clone() for name, value in (*encoding.named_parameters(), *encoding.named_buffers())}
        table = encoding(GRID)
        assert encoding.double()(GRID).cos.dtype == torch.float64
        for name, value in (*encoding.bfloat16().named_parameters(), *encoding.named_buffers()):
            assert torch.equal(value, before[name]) and value.dtype == torch.float32
        assert_same_table(encoding(GRID), table)


def test_meta_device():
    """Built or emptied on the meta device, as large models are, the frequencies are made anew."""
    before = AxialRoPE(16).frequencies
    with torch.device("meta"):
        built, mixed = AxialRoPE(16, strength=0.25), MixedRoPE(16, 2, init="identity")
    assert built.strength.device.type == "meta"
    built, mixed = (encoding.bfloat16().to_empty(device="cpu") for encoding in (built, mixed))
    assert torch.equal(built.frequencies, before)
    for encoding, start in ((built, 0.25), (mixed, 0.0)):
        encoding.reset_parameters()
        assert parameter_of(encoding).dtype == torch.float32 and (parameter_of(encoding) == start).all()
    moved = AxialRoPE(16).to("meta")
    assert moved.frequencies.device.type == "meta"
    assert torch.equal(moved.to_empty(device="cpu").frequencies, before)


def test_default_dtype_does_not_matter():
    def made():
        torch.manual_seed(5)
        return AxialRoPE(16, strength=0.3), MixedRoPE(16, 2), convention("eva02", 16), convention("dinov3", 16)

    before = [(encoding, encoding(GRID)) for encoding in made()]
    torch.set_default_dtype(torch.bfloat16)
    try:
        after = [(encoding, encoding(GRID)) for encoding in made()]
    finally:
        torch.set_default_dtype(torch.float32)
    for (expected, table), (encoding, same) in zip(before, after, strict=True):
        assert torch.equal(encoding.frequencies, expected.frequencies)
        assert encoding.frequencies.dtype == torch.float32
        assert_same_table(same, table)
    assert after[0][0].strength.dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: AxialRoPE(16), lambda: learned("strength"), lambda: learned("mixed")])
def test_autocast_and_compile(make):
    encoding = make()
    before = encoding(GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_table(encoding(GRID), before)
    compiled = torch.compile(encoding, fullgraph=True, backend="aot_eager")
    assert_same_table(compiled(GRID), before)
    assert_same_table(compiled(GRID.coordinates()), before)


def test_state_dict_and_copy():
    assert not AxialRoPE(16).state_dict()
    assert set(AxialRoPE(16, strength=0.5).state_dict()) == {"strength"}
    assert set(MixedRoPE(16, 2).state_dict()) == {"frequencies"}
    encoding = AxialRoPE(16, theta=50.0)
    assert torch.equal(copy.deepcopy(encoding)(PatchGrid(3, 3)).cos, encoding(PatchGrid(3, 3)).cos)


FAR = {
    "axial": lambda: AxialRoPE(64),
    "split, offset and scale": lambda: AxialRoPE(64, 100.0, layout="split", offset=1.0, scale=0.37),
    "period": lambda: AxialRoPE(64, 100.0, frequency="period", scale=0.1),
    "periods": lambda: AxialRoPE(64, frequency="period", period_range=(0.7, 90.0), axis_order="wh"),
    "strength": lambda: AxialRoPE(64, strength=0.77),
    "mixed": lambda: MixedRoPE(64, 3),
}


@pytest.mark.parametrize("shift", [65_536, 1_000_000, 2**24])
@pytest.mark.parametrize("kind", FAR)
def test_a_shift_of_all_coordinates_does_not_change_attention(kind, shift):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, GRID.num_tokens, 3, 64, generator=generator)
    torch.manual_seed(0)
    encoding = FAR[kind]().requires_grad_(False)
    here = GRID.coordinates().long()
    near, far = encoding(here), encoding(here + shift)

    def change(q, k, v):
        outputs = [rope_attention(q, k, v, rotary, backend="reference") for rotary in (near, far)]
        return (outputs[0] - outputs[1]).abs().max()

    assert change(q.double(), k.double(), v.double()) < 5e-7  # that of the tables alone
    # q, k / 2: float32 attention rounds logits of unit normals by 5e-7, which moves its output by 1.5e-6 with any table
    assert change(q / 2, k / 2, v) < 1e-6
    if shift < 2**24:  # float32 holds each of them
        assert_same_table(encoding((here + shift).float()), far)


@pytest.mark.parametrize("shift", [0, 2**24])
@pytest.mark.parametrize("kind", FAR)
def test_cos_and_sin_are_those_of_exact_angles(kind, shift):
    encoding = FAR[kind]().requires_grad_(False)
    points = GRID.coordinates().long() + shift
    table = encoding(points)
    exact = encoding.double()(points)
    assert table.cos.dtype == torch.float32 and exact.cos.dtype == torch.float64
    for ours, theirs in ((table.cos, exact.cos), (table.sin, exact.sin)):
        assert (ours.double() - theirs).abs().max() < 3.1e-7
    if kind in ("axial", "mixed"):  # and these are right: 2^25 radians at most, rounded by 4e-9
        angles = torch.einsum("nc,chp->nhp", points.double(), encoding.frequencies)
        assert (exact.cos[0] - angles.cos()).abs().max() < 2e-8


class Tables(torch.nn.Module):
    def __init__(self, *encodings):
        super().__init__()
        self.encodings = torch.nn.ModuleList(encodings)

    def forward(self, points):
        return tuple(encoding(points).cos for encoding in self.encodings)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_keeps_the_angles(dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = Tables(AxialRoPE(16, offset=1.0), AxialRoPE(16, frequency="period"), MixedRoPE(16, 2)).requires_grad_(False)
    points, path = GRID.coordinates() + 2**23, str(tmp_path / "tables.onnx")
    torch.onnx.export(model, (points,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tables = session.run(None, {session.get_inputs()[0].name: points.numpy()})
    for table, expected in zip(tables, model(points), strict=True):
        torch.testing.assert_close(torch.from_numpy(table), expected, rtol=0, atol=4e-7)


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), f"{func} computed float64"
        return out


@pytest.mark.parametrize("kind", FAR)
def test_a_device_without_float64(kind, monkeypatch):
    encoding = FAR[kind]()
    before = encoding(GRID)
    monkeypatch.setattr(encodings, "_WITHOUT_FLOAT64", ("cpu",))
    with NoFloat64():
        raw = encoding(GRID.coordinates())
    for table in (raw, encoding(GRID), encoding(GRID.coordinates().double())):
        assert table.cos.dtype == torch.float32
        # 6e-8 of each product and of their sum, of at most 135 radians ("periods")
        torch.testing.assert_close(table.cos, before.cos, rtol=0, atol=1.7e-5)
        torch.testing.assert_close(table.sin, before.sin, rtol=0, atol=1.7e-5)


@pytest.mark.parametrize("kind", ["strength", "mixed"])
def test_gradients_keep_their_dtypes(kind):
    encoding = learned(kind)
    points = GRID.coordinates().requires_grad_()
    rotary = encoding(points)
    (rotary.cos + 2 * rotary.sin).square().sum().backward()
    assert points.grad.dtype == parameter_of(encoding).grad.dtype == torch.float32
    assert points.grad.abs().min() > 0 and parameter_of(encoding).grad.abs().min() > 0
