# SPDX-License-Identifier: Apache-2.0
"""Every convention against the code of its own model family, and the modules that make the tables."""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spatial_pe import apply_rotary, encodings, rope_attention
from spatial_pe.conventions import CONVENTIONS, convention
from spatial_pe.encodings import AxialRoPE, MixedRoPE
from spatial_pe.grid import PatchGrid
from spatial_pe.rotary import Rotary, split_pairs

# Rotated unit normals, |x| <= 5, by a model's angles of up to 24 radians, which it rounds by 1e-6.
ROTATED = {"rtol": 0.0, "atol": 1e-5}

# Models round the angle to float32, 5e-7 at 10 radians; our cos and sin are within 3e-7 of the exact ones.
TABLE = {"rtol": 0.0, "atol": 1e-6}


def modeling(name: str):
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def configuration(name: str, class_name: str):
    return getattr(importlib.import_module(f"transformers.models.{name}.configuration_{name}"), class_name)


def assert_table(rotary: Rotary, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Ours (1, N, 1, R/2) against the model's (N, R), which repeats every angle for both channels of a pair."""
    for ours, theirs in ((rotary.cos, cos), (rotary.sin, sin)):
        for channel in split_pairs(theirs, rotary.pairing):
            torch.testing.assert_close(ours[0, :, 0], channel, **TABLE)


# ------------------------------------------------- transformers: one class per family, the same way to call it

# convention: (module, class name before "VisionRotaryEmbedding", configuration class)
FAMILIES = {
    "qwen2_vl": ("qwen2_vl", "Qwen2VL", "Qwen2VLVisionConfig"),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VL", "Qwen2_5_VLVisionConfig"),
    "qwen2_5_omni": ("qwen2_5_omni", "Qwen2_5Omni", "Qwen2_5OmniVisionEncoderConfig"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VL", "Qwen3VLVisionConfig"),
    "qwen3_vl_moe": ("qwen3_vl_moe", "Qwen3VLMoe", "Qwen3VLMoeVisionConfig"),
    "qwen3_omni_moe": ("qwen3_omni_moe", "Qwen3OmniMoe", "Qwen3OmniMoeVisionEncoderConfig"),
    "qwen3_5": ("qwen3_5", "Qwen3_5", "Qwen3_5VisionConfig"),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5Moe", "Qwen3_5MoeVisionConfig"),
    "qwen4_exp": ("qwen4_exp", "Qwen4Exp", "Qwen4ExpVisionConfig"),
    "glm4v": ("glm4v", "Glm4v", "Glm4vVisionConfig"),
    "glm4v_moe": ("glm4v_moe", "Glm4vMoe", "Glm4vMoeVisionConfig"),
    "glm_ocr": ("glm_ocr", "GlmOcr", "GlmOcrVisionConfig"),
    "glm5_next": ("glm5_next", "Glm5Next", "Glm5NextVisionConfig"),
    "ernie4_5_vl_moe": ("ernie4_5_vl_moe", "Ernie4_5_VLMoe", "Ernie4_5_VLMoeVisionConfig"),
    "paddleocr_vl": ("paddleocr_vl", "PaddleOCR", "PaddleOCRVisionConfig"),
    "video_llama_3": ("video_llama_3", "VideoLlama3", "VideoLlama3VisionConfig"),
    "exaone4_5": ("exaone4_5", "Exaone4_5_", "Exaone4_5_VisionConfig"),
    "cohere_compass": ("cohere_compass", "CohereCompass", "CohereCompassVisionConfig"),
    "dots3_note": ("dots3_note", "Dots3Note", "Dots3NoteVisionConfig"),
    "lfm3_vl": ("lfm3_vl", "Lfm3Vl", "Lfm3VlVisionConfig"),
    "step3p7": ("step3p7", "Step3p7", "Step3p7VisionConfig"),
    "muse_glimmer": ("muse_glimmer", "MuseGlimmer", "MuseGlimmerVisionConfig"),
    "muse_spark": ("muse_spark", "MuseSpark", "MuseSparkVisionConfig"),
    "inkling2": ("inkling2", "Inkling2", "Inkling2VisionConfig"),
    "kimi": ("kimi_k25", "Kimi_K25", "Kimi_K25VisionConfig"),
}
TRANSFORMERS_4 = {
    "qwen2_vl": "VisionRotaryEmbedding",
    "qwen2_5_vl": "Qwen2_5_VisionRotaryEmbedding",
    "qwen2_5_omni": "Qwen2_5_VisionRotaryEmbedding",
}

# What the model's forward does to (row, column) before it calls the rotary class.
POSITIONS = {"muse_glimmer": lambda ids: ids.flip(-1) + 1, "muse_spark": lambda ids: ids.flip(-1) + 1}
INKLING_GRID = PatchGrid.packed([(4, 6), (2, 8)], merge_size=2, prefix=1)
GRIDS = {"inkling2": INKLING_GRID}
POSITIONS["inkling2"] = lambda ids: torch.where(INKLING_GRID.rotated[:, None], ids + 1, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_same_table_and_output_as_transformers(name):
    module_name, prefix, config_name = FAMILIES[name]
    module = modeling(module_name)
    grid = GRIDS.get(name, PatchGrid.packed([(4, 6), (2, 8)], merge_size=2))
    position_ids = POSITIONS.get(name, lambda ids: ids)(grid.coordinates().long())
    rotary_class = getattr(module, f"{prefix}VisionRotaryEmbedding", None) or getattr(module, TRANSFORMERS_4[name])
    if "dim" in inspect.signature(rotary_class.__init__).parameters:  # transformers 4: a ladder, indexed by position
        head_dim = 80
        ladder = rotary_class(head_dim // 2)(10)
        angles = ladder[position_ids].flatten(1).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
    else:
        model_rotary = rotary_class(configuration(module_name, config_name)())
        head_dim = 4 * model_rotary.inv_freq.numel()
        cos, sin = model_rotary(torch.zeros(1), position_ids)
        # each pair has one axis: the ladder once for each, bit for bit where the head_dim is a power of two
        exact = head_dim & (head_dim - 1) == 0
        ours, theirs = convention(name, head_dim).frequencies.sum((0, 1)).unique(), model_rotary.inv_freq.unique()
        torch.testing.assert_close(ours, theirs, rtol=0.0 if exact else 2e-7, atol=0.0)
    rotary = convention(name, head_dim)(grid)
    assert_table(rotary, cos, sin)

    apply = module.apply_rotary_pos_emb_vision
    x = torch.randn(grid.num_tokens, 3, head_dim)
    if "freqs" in inspect.signature(apply).parameters:  # transformers 4, qwen2_5_omni
        turned = apply(x[None], angles[:, : head_dim // 2])[0]
    else:
        turned, _ = apply(x, x, cos, sin)
    torch.testing.assert_close(apply_rotary(x, rotary), turned, **ROTATED)


def test_pixtral():
    module = modeling("pixtral")
    config = configuration("pixtral", "PixtralVisionConfig")(hidden_size=96, num_attention_heads=2, image_size=160)
    grid = PatchGrid.packed([(3, 5), (4, 2)])
    x = torch.randn(1, 2, grid.num_tokens, 48)
    if hasattr(module, "PixtralVisionRotaryEmbedding"):
        cos, sin = module.PixtralVisionRotaryEmbedding(config)(x, grid.coordinates().long())
    else:  # transformers 4: one index into a table of all places
        row, column = grid.coordinates().long().unbind(1)
        cos, sin = module.PixtralRotaryEmbedding(config)(x, row * (config.image_size // config.patch_size) + column)
    rotary = convention("pixtral", 48)(grid)
    assert_table(rotary, cos, sin)
    turned, _ = module.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=0)
    torch.testing.assert_close(apply_rotary(x.transpose(1, 2), rotary).transpose(1, 2), turned, **ROTATED)


@pytest.mark.parametrize("head_dim", [32, 48])
@pytest.mark.parametrize(
    ("name", "class_name", "config_name"),
    [
        ("dinov3", "DINOv3ViTRopePositionEmbedding", "DINOv3ViTConfig"),
        ("sapiens2", "Sapiens2RopePositionEmbedding", "Sapiens2Config"),
        ("eomt_dinov3", "EomtDinov3RotaryEmbedding", "EomtDinov3Config"),
    ],
)
def test_dinov3(name, class_name, config_name, head_dim):
    module_name = {"dinov3": "dinov3_vit"}.get(name, name)
    module = modeling(module_name)
    config = configuration(module_name, config_name)(hidden_size=96, num_attention_heads=96 // head_dim, patch_size=4)
    grid = PatchGrid(5, 7, prefix=5)
    cos, sin = getattr(module, class_name)(config).eval()(torch.zeros(1, 3, 20, 28))
    rotary = convention(name, head_dim)(grid)
    assert_table(Rotary(rotary.cos[:, 5:], rotary.sin[:, 5:]), cos, sin)
    x = torch.randn(2, 96 // head_dim, grid.num_tokens, head_dim)
    turned, _ = module.apply_rotary_pos_emb(x, x, cos, sin)
    ours = apply_rotary(x.transpose(1, 2), rotary).transpose(1, 2)
    torch.testing.assert_close(ours, turned, rtol=0, atol=5e-6)
    assert torch.equal(ours[:, :, :5], x[:, :, :5])


def test_llama4():
    module = modeling("llama4")
    config = configuration("llama4", "Llama4VisionConfig")(
        hidden_size=176, num_attention_heads=2, image_size=70, patch_size=14
    )
    freqs_ci = module.Llama4VisionRotaryEmbedding(config)(torch.zeros(1))  # (N, 1, D/2) complex
    grid = PatchGrid(5, 5, suffix=1)
    rotary = convention("llama4", 88)(grid)
    torch.testing.assert_close(rotary.cos[0, :, 0], freqs_ci.real[:, 0], **TABLE)
    torch.testing.assert_close(rotary.sin[0, :, 0], freqs_ci.imag[:, 0], **TABLE)
    x = torch.randn(2, 26, 2, 88)
    turned, _ = module.vision_apply_rotary_emb(x, x, freqs_ci)
    torch.testing.assert_close(apply_rotary(x, rotary), turned, **ROTATED)


@pytest.mark.parametrize("window_size", [4, 0])
def test_sam3(window_size):
    module = modeling("sam3")
    config = configuration("sam3", "Sam3ViTConfig")(
        hidden_size=160, num_attention_heads=2, image_size=12 * 14, patch_size=14, window_size=4
    )
    side = window_size or 12
    position_ids = module.Sam3ViTLayer.precompute_positions(config, window_size)
    cos, sin = module.Sam3ViTRotaryEmbedding(config)(torch.zeros(1), position_ids)
    rotary = convention("sam3", 80, scale=4 / side)(PatchGrid(side, side))
    assert_table(rotary, cos[0], sin[0])
    x = torch.randn(1, 2, side * side, 80)
    turned, _ = module.apply_rotary_pos_emb_2d(x, x, cos, sin)
    torch.testing.assert_close(apply_rotary(x.transpose(1, 2), rotary).transpose(1, 2), turned, **ROTATED)


def test_sam2_video_memory_attention():
    module = modeling("sam2_video")
    if not hasattr(module.Sam2VideoVisionRotaryEmbedding, "recomposition_frequencies"):
        pytest.skip("transformers 5 is needed: version 4 makes its table inside the model")
    config = SimpleNamespace(
        rope_parameters={"rope_type": "axial", "rope_theta": 10000.0},
        memory_attention_hidden_size=64,
        memory_attention_downsample_rate=1,
        memory_attention_num_attention_heads=1,
        memory_attention_rope_feat_sizes=[5, 5],
    )
    position_ids = module.Sam2VideoMemoryAttention.precompute_positions(config)
    cos, sin = module.Sam2VideoVisionRotaryEmbedding(config)(torch.zeros(1), position_ids)
    assert_table(convention("sam2_video", 64)(PatchGrid(5, 5)), cos[0], sin[0])


def test_gemma4():
    module = modeling("gemma4")
    config = configuration("gemma4", "Gemma4VisionConfig")(head_dim=72)
    # two images of a padded batch; positions are (x, y), padding is (-1, -1)
    points = torch.full((2, 12, 2), -1)
    points[0] = PatchGrid(3, 4).coordinates()
    points[1, :6] = PatchGrid(3, 2).coordinates()
    position_ids = points.flip(-1)
    x = torch.randn(2, 12, 3, 72)
    cos, sin = module.Gemma4VisionRotaryEmbedding(config)(x, position_ids)
    encoding = convention("gemma4", 72)
    rotary = encoding(points)
    assert rotary.cos.shape == (2, 12, 1, 36)
    turned = module.apply_multidimensional_rope(x, cos, sin, position_ids)
    torch.testing.assert_close(apply_rotary(x, rotary), turned, **ROTATED)
    assert_table(encoding(PatchGrid(3, 4)), cos[0], sin[0])


# -------------------------------------------------------------- families that transformers does not have


def loops(grid: PatchGrid, head_dim: int, angles) -> torch.Tensor:
    """(N, D/2) in double precision from angles(row, column, height, width) -> list, one token at a time."""
    (height, width), rows = grid.images[0], []
    for row in range(height):
        rows += [angles(row, column, height, width) for column in range(width)]
    blank = [[0.0] * (head_dim // 2)]
    return torch.tensor(blank * grid.prefix + rows + blank * grid.suffix, dtype=torch.float64)


def ladder(theta: float, head_dim: int) -> list[float]:
    return [theta ** (-4 * i / head_dim) for i in range(head_dim // 4)]


def dinov3_original(mode: str, periods: list[float]):
    def angles(row, column, height, width):
        sizes = {"separate": (height, width), "min": (min(height, width),) * 2, "max": (max(height, width),) * 2}[mode]
        centres = [2 * (i + 0.5) / n - 1 for i, n in zip((row, column), sizes, strict=True)]
        return [2 * math.pi * c / p for c in centres for p in periods]

    return angles


D = 48
PERIODS = [0.2 * (30.0 / 0.2) ** (i / (D // 4 - 1)) for i in range(D // 4)]
FORMULAS = {
    # EVA-02: asuka/rope.py, t = arange(n) / n * 16, rows then columns
    "eva02": ("eva02", {}, lambda r, c, h, w: [x * f for x in (r / h * 16, c / w * 16) for f in ladder(1e4, D)]),
    # core/vision_encoder/rope.py: columns then rows, counted from 1 because CLS is 0
    "perception_encoder": (
        "perception_encoder",
        {},
        lambda r, c, h, w: [x * f for x in (c + 1, r + 1) for f in ladder(1e4, D)],
    ),
    # timm's port of it for another resolution: grid_offset before the scaling to ref_feat_shape
    "perception_encoder_scaled": (
        "perception_encoder",
        {"reference_size": (24, 32)},
        lambda r, c, h, w: [x * f for x in ((c + 1) / w * 32, (r + 1) / h * 24) for f in ladder(1e4, D)],
    ),
    # deit/models_v2_rope.py compute_axial_cis: x block, y block, theta 100
    "rope_vit_axial": ("rope_vit_axial", {}, lambda r, c, h, w: [x * f for x in (c, r) for f in ladder(100.0, D)]),
    # rope_position_encoding.py of DINOv3
    "dinov3_min": ("dinov3", {"normalize": "min"}, dinov3_original("min", [1 / f for f in ladder(100.0, D)])),
    "dinov3_max": ("dinov3", {"normalize": "max"}, dinov3_original("max", [1 / f for f in ladder(100.0, D)])),
    "dinov3_periods": ("dinov3", {"period_range": (0.2, 30.0)}, dinov3_original("separate", PERIODS)),
    # its rescale augmentation multiplies the coordinates
    "dinov3_rescaled": (
        "dinov3",
        {"scale": 1.5, "rotary_dim": 24},
        lambda r, c, h, w: [
            2 * math.pi * 1.5 * (2 * (i + 0.5) / n - 1) * f for i, n in ((r, h), (c, w)) for f in ladder(100.0, 24)
        ],
    ),
}


@pytest.mark.parametrize("case", FORMULAS)
@pytest.mark.parametrize("grid", [PatchGrid(5, 7, prefix=2, suffix=1), PatchGrid(6, 3)])
def test_formulas_of_the_original_code(case, grid):
    name, options, angles = FORMULAS[case]
    encoding = convention(name, D, **options)
    expected = loops(grid, encoding.rotary_dim, angles)
    rotary = encoding(grid)
    # float32 rounding of angles up to 31 radians
    torch.testing.assert_close(rotary.cos[0, :, 0].double(), expected.cos(), rtol=0, atol=5e-6)
    torch.testing.assert_close(rotary.sin[0, :, 0].double(), expected.sin(), rtol=0, atol=5e-6)
    fixed = ~grid.rotated
    assert (rotary.cos[0, fixed] == 1).all() and (rotary.sin[0, fixed] == 0).all()
    assert rotary.pairing == ("half" if name == "dinov3" else "interleaved")


@pytest.mark.parametrize("rotary_dim", [32, 20])
def test_rope_vit_mixed(rotary_dim):
    grid = PatchGrid(4, 5, prefix=1)
    torch.manual_seed(3)
    encoding = convention("rope_vit_mixed", 32, num_heads=3, rotary_dim=rotary_dim)
    torch.manual_seed(3)
    turns = (2 * math.pi * torch.rand(3, 1)).flatten().tolist()
    row, column = grid.coordinates().double().unbind(1)
    rotary = encoding(grid)
    assert rotary.pairing == "interleaved" and rotary.cos.shape == (1, 21, 3, rotary_dim // 2)
    for head, turn in enumerate(turns):
        # deit/models_v2_rope.py: theta 10; the second half of the pairs looks at right angles to the first
        sizes = [10 ** (-4 * i / rotary_dim) for i in range(rotary_dim // 4)]
        f_x = torch.tensor([m * math.cos(turn + q) for q in (0, math.pi / 2) for m in sizes], dtype=torch.float64)
        f_y = torch.tensor([m * math.sin(turn + q) for q in (0, math.pi / 2) for m in sizes], dtype=torch.float64)
        angles = column[:, None] * f_x + row[:, None] * f_y
        torch.testing.assert_close(rotary.cos[0, :, head].double(), angles.cos(), rtol=0, atol=3e-6)
        torch.testing.assert_close(rotary.sin[0, :, head].double(), angles.sin(), rtol=0, atol=3e-6)


TIMM = {
    "eva02": ({"ref_feat_shape": (16, 16)}, {}),
    "perception_encoder": (
        {"grid_offset": 1.0, "grid_indexing": "xy", "ref_feat_shape": (24, 24)},
        {"reference_size": 24},
    ),
    "rope_vit_axial": ({"temperature": 100.0, "grid_indexing": "xy"}, {}),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    layers = pytest.importorskip("timm.layers")
    timm_options, options = TIMM[name]
    table = layers.RotaryEmbeddingCat(48, in_pixels=False, feat_shape=(5, 7), **timm_options).get_embed()
    x = torch.randn(2, 35, 3, 48)
    ours = apply_rotary(x, convention(name, 48, **options)(PatchGrid(5, 7)))
    torch.testing.assert_close(ours.transpose(1, 2), layers.apply_rot_embed_cat(x.transpose(1, 2), table), **ROTATED)


def test_timm_mixed():
    layers = pytest.importorskip("timm.layers")
    theirs = layers.RotaryEmbeddingMixed(96, depth=1, num_heads=3, feat_shape=(5, 7))
    ours = convention("rope_vit_mixed", 32, num_heads=3)
    with torch.no_grad():
        ours.frequencies.copy_(theirs.freqs[:, 0].flip(0))
        table = theirs.get_embed()[0]  # (H, N, 2 D)
    x = torch.randn(2, 35, 3, 32)
    expected = layers.apply_rot_embed_cat(x.transpose(1, 2), table).transpose(1, 2)
    torch.testing.assert_close(apply_rotary(x, ours(PatchGrid(5, 7))), expected, rtol=0, atol=1e-5)


def test_every_convention_has_been_compared():
    elsewhere = {"pixtral", "dinov3", "sapiens2", "eomt_dinov3", "llama4", "sam3", "sam2_video", "gemma4"}
    formulas = {"eva02", "perception_encoder", "rope_vit_axial", "rope_vit_mixed"}
    assert set(CONVENTIONS) == set(FAMILIES) | elsewhere | formulas
    assert all(row.source for row in CONVENTIONS.values())


# ------------------------------------------------------------------------------- casting, moving, copying

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


# ----------------------------------------------------------------------------------- coordinates far from 0

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


# ----------------------------------------------------------------------------------------- learnable parts


def test_strength_scales_the_angles():
    grid = PatchGrid(4, 5, prefix=1)
    full, half, none = (AxialRoPE(16, strength=s)(grid) for s in (1.0, 0.5, 0.0))
    plain = AxialRoPE(16)(grid)
    assert torch.equal(full.cos, plain.cos) and torch.equal(full.sin, plain.sin)
    assert (none.cos == 1).all() and (none.sin == 0).all()
    torch.testing.assert_close(half.cos**2 - half.sin**2, plain.cos, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "encoding", [AxialRoPE(16, strength=0.0), MixedRoPE(16, 2, init="identity")], ids=["strength", "mixed"]
)
def test_identity_start_has_a_gradient_for_every_parameter(encoding):
    """Through attention: a gradient that vanished at the identity would never leave it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 12, 2, 16, generator=generator)
    rotary = encoding(PatchGrid(3, 4))
    assert torch.equal(apply_rotary(q, rotary), q)
    logits = torch.einsum("bnhd,bmhd->bhnm", apply_rotary(q, rotary), apply_rotary(k, rotary)) / 4
    torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v).square().sum().backward()
    (parameter,) = encoding.parameters()
    assert (parameter.grad.abs() > 1e-8).all()


def test_gradients():
    points = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    axial, mixed = AxialRoPE(8, strength=0.7, offset=1.0).double(), MixedRoPE(8, 2).double()

    def check(encoding, name):
        def table(points, parameter):
            rotary = torch.func.functional_call(encoding, {name: parameter}, (points,))
            return rotary.cos, rotary.sin

        inputs = (points, encoding.get_parameter(name).detach().requires_grad_())
        return torch.autograd.gradcheck(table, inputs, check_forward_ad=True, check_batched_grad=True)

    assert check(axial, "strength") and check(mixed, "frequencies")


# ---------------------------------------------------------------------------------- raw coordinates, errors


@pytest.mark.parametrize("name", ["pixtral", "llama4", "kimi", "sam3"])
def test_raw_coordinates_equal_the_grid(name):
    grid = PatchGrid(4, 6)
    encoding = convention(name, 32, scale=0.5)
    for points in (grid.coordinates(), grid.coordinates().long()):
        assert torch.equal(encoding(points).sin, encoding(grid).sin)
    assert torch.equal(encoding(grid.coordinates()[None].repeat(2, 1, 1)).sin, encoding(grid).sin.repeat(2, 1, 1, 1))


def test_repr_shows_what_differs():
    assert repr(AxialRoPE(64)) == "AxialRoPE(64, theta=10000, pairing='half')"
    text = repr(AxialRoPE(64, 100.0, layout="split", offset=1.0, rotary_dim=32, strength=0.0))
    assert text == (
        "AxialRoPE(64, theta=100, pairing='half', rotary_dim=32, layout='split', offset=1.0, learnable strength)"
    )
    assert repr(MixedRoPE(64, 6)) == "MixedRoPE(64, num_heads=6, theta=10, pairing='interleaved')"


POINTS = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: AxialRoPE(30),
            ValueError,
            "head_dim must be a multiple of 4 .* got 30: pass rotary_dim=28 to leave 2",
        ),
        (lambda: AxialRoPE(3), ValueError, "head_dim must be a multiple of 4 .* got 3$"),
        (lambda: AxialRoPE(64.0), TypeError, "head_dim must be an int, got float"),
        (lambda: AxialRoPE(64, rotary_dim=68), ValueError, "rotary_dim must be at most head_dim=64, got 68"),
        (lambda: AxialRoPE(64, rotary_dim=30), ValueError, "rotary_dim must be a multiple of 4"),
        (lambda: AxialRoPE(64, 0.0), ValueError, "theta must be positive and finite, got 0.0"),
        (lambda: AxialRoPE(64, "1e4"), TypeError, "theta must be a number, got str"),
        (lambda: AxialRoPE(64, pairing="pairs"), ValueError, "pairing must be one of .*got 'pairs'"),
        (lambda: AxialRoPE(64, axis_order="xy"), ValueError, "axis_order must be one of .*got 'xy'"),
        (lambda: AxialRoPE(64, layout="thirds"), ValueError, "layout must be one of .*got 'thirds'"),
        (lambda: AxialRoPE(64, frequency="hz"), ValueError, "frequency must be one of .*got 'hz'"),
        (lambda: AxialRoPE(64, normalize="mean"), ValueError, "normalize must be one of .*got 'mean'"),
        (lambda: AxialRoPE(64, period_range=(1, 2)), ValueError, 'period_range=.* needs frequency="period"'),
        (
            lambda: AxialRoPE(64, frequency="period", period_range=3),
            ValueError,
            r"must be \(shortest, longest\), got 3",
        ),
        (
            lambda: AxialRoPE(64, frequency="period", period_range=(3, 1)),
            ValueError,
            r"\(shortest, longest\), got \(3, 1",
        ),
        (lambda: AxialRoPE(64, normalize="min", offset=1.0), ValueError, "normalize='min' .* got offset=1.0"),
        (lambda: AxialRoPE(64, reference_size=(1, 2, 3)), ValueError, "reference_size must be an int or"),
        (lambda: AxialRoPE(64, reference_size=0), ValueError, "reference_size must be at least 1, got 0"),
        (lambda: AxialRoPE(64, scale=math.nan), ValueError, "scale must be finite, got nan"),
        (lambda: AxialRoPE(64, strength=True), TypeError, "strength must be a number, got bool"),
        (lambda: MixedRoPE(64, 0), ValueError, "num_heads must be at least 1, got 0"),
        (lambda: MixedRoPE(64, 2, init="zeros"), ValueError, "init must be one of .*got 'zeros'"),
        (lambda: MixedRoPE(62, 2), ValueError, "head_dim must be a multiple of 4"),
        (lambda: AxialRoPE(64)((4, 4)), TypeError, "takes a PatchGrid or a coordinates tensor .* got tuple"),
        (lambda: MixedRoPE(64, 2)([[0, 0]]), TypeError, "takes a PatchGrid or a coordinates tensor .* got list"),
        (lambda: AxialRoPE(64)(torch.zeros(3)), ValueError, r"\(row, column\) pairs.* got shape \(3,\)"),
        (lambda: AxialRoPE(64)(torch.zeros(3, 3)), ValueError, r"got shape \(3, 3\)"),
        (lambda: AxialRoPE(64)(POINTS.bfloat16()), TypeError, "got torch.bfloat16: use coordinates.float"),
        (lambda: AxialRoPE(64)(POINTS / 0), ValueError, "coordinates hold NaN or Inf in 3 of 3 tokens"),
        (lambda: convention("dinov3", 64)(POINTS), ValueError, "normalize='separate' needs the size of the image"),
        (lambda: convention("eva02", 64)(POINTS), ValueError, r"reference_size=\(16, 16\) needs the size of the image"),
        (
            lambda: convention("qwen", 64),
            ValueError,
            "unknown convention 'qwen': it must be one of qwen2_5_vl, pixtral",
        ),
        (lambda: convention("rope_vit_mixed", 64), TypeError, "num_heads"),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()
