# SPDX-License-Identifier: Apache-2.0
"""Every convention against the code of its own model family."""

from __future__ import annotations

import importlib
import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from spatial_pe import apply_rotary
from spatial_pe.conventions import CONVENTIONS, convention
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
        expected = apply(x[None], angles[:, : head_dim // 2])[0]
    else:
        expected, _ = apply(x, x, cos, sin)
    torch.testing.assert_close(apply_rotary(x, rotary), expected, **ROTATED)


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
    expected, _ = module.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=0)
    torch.testing.assert_close(apply_rotary(x.transpose(1, 2), rotary).transpose(1, 2), expected, **ROTATED)


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
    expected, _ = module.apply_rotary_pos_emb(x, x, cos, sin)
    ours = apply_rotary(x.transpose(1, 2), rotary).transpose(1, 2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-6)
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
    expected, _ = module.vision_apply_rotary_emb(x, x, freqs_ci)
    torch.testing.assert_close(apply_rotary(x, rotary), expected, **ROTATED)


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
    expected, _ = module.apply_rotary_pos_emb_2d(x, x, cos, sin)
    torch.testing.assert_close(apply_rotary(x.transpose(1, 2), rotary).transpose(1, 2), expected, **ROTATED)


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
    expected = module.apply_multidimensional_rope(x, cos, sin, position_ids)
    torch.testing.assert_close(apply_rotary(x, rotary), expected, **ROTATED)
    assert_table(encoding(PatchGrid(3, 4)), cos[0], sin[0])


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
    directions = (2 * math.pi * torch.rand(3, 1)).flatten().tolist()
    row, column = grid.coordinates().double().unbind(1)
    rotary = encoding(grid)
    assert rotary.pairing == "interleaved" and rotary.cos.shape == (1, 21, 3, rotary_dim // 2)
    for head, direction in enumerate(directions):
        # deit/models_v2_rope.py: theta 10; the second half of the pairs looks at right angles to the first
        sizes = [10 ** (-4 * i / rotary_dim) for i in range(rotary_dim // 4)]
        f_x = torch.tensor([m * math.cos(direction + q) for q in (0, math.pi / 2) for m in sizes], dtype=torch.float64)
        f_y = torch.tensor([m * math.sin(direction + q) for q in (0, math.pi / 2) for m in sizes], dtype=torch.float64)
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
