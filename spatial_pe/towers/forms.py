# SPDX-License-Identifier: Apache-2.0
"""Data: the forms of attention modules, the tested classes, and those that are never patched.

An attention module is recognised by the arguments of its forward and by its projections, never by its name. A class in
``TESTED`` is part of this package's tests: it is trusted with ``verify=False``, and a difference found by ``verify``
raises. Any other class that has a form is patched only if verification succeeds, which also finds its pairing. Trusted
classes are named by module and class: code that comes with a checkpoint has classes of the same names that do something
else (Ovis2.5's ``Siglip2Attention`` rotates). Refused classes are named by class alone, which covers copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# cos and sin of a column per channel, as a pair; exp(i angle); angles, a column per pair; [sin | cos] in one tensor;
# or the positions of the tokens, for the module's own callable that rotates by them
TABLES = ("cos_sin", "complex", "angles", "sin_cos_cat", "positions")
RETURNS = ("tuple", "tensor")
# of each token (B, N, axes); angles (B, N, D), a column per channel; (height, width) of the grid
POSITIONS = ("coordinates", "angles", "grid")
# beside those of rotary.py: an encoding that is no rotation of pairs, applied by the module's own callable
OWN = "own"


@dataclass(frozen=True)
class ForwardForm:
    """Form of an attention module: its forward takes ``first``, all of ``needs``, and no more than ``takes``.

    Attributes:
        name: as it appears in reports.
        needs, takes: names of arguments.
        first: the argument that holds the tokens, (B, N, C), or (T, C) with ``bounds``.
        keys, values: of attention to other tokens, the arguments that hold those of the keys and of the values.
        rotation: the argument that holds the rotation, if any.
        own_table: ``rotation`` is no argument but an attribute: the table of a square grid, which the module makes
            again for another one by ``compute_cis(end_x=, end_y=)`` (SAM 2).
        rotation_k: the argument that holds that of the keys. Without one it is that of the queries, repeated if there
            are so many keys.
        tables: its format, one of TABLES.
        rope: with "positions", attributes of which one holds the callable: ``rope(x, positions)`` rotates
            (B, H, N, D). None there, or no positions in a call: no rotation.
        function: instead, the name of a function beside the class.
        both: the callable is ``rope(q, k, positions)``, and returns both.
        positions: what they are, one of POSITIONS.
        places: the method that returns them: ``places(x, masks=<the argument named rotation>)`` (V-JEPA 2).
        excluded: the argument with the number of last keys that are not rotated.
        groups: the argument with the number of times that the rotation of the keys is repeated.
        bounds: the cu_seqlens argument, if any.
        returns: "tuple" (output, weights) or "tensor": of classes of this form unless ``TESTED`` or a proof says
            otherwise.
        mask: the argument that may hold a padding mask.
        method: the method that is attention, if that is not forward but a part of it: of a layer (MoonViT).
        qkv: attributes of the projections of q, k and v, or of one fused projection [q | k | v]; out, heads, head_dim,
            scale: attributes of the output projection, of these numbers, and of the scale of the scores. Left out:
            any of the names that layout.py knows.
        anywhere: only attention over images takes such arguments: served also outside of a tower with a patch
            embedding (memory attention, decoders).
    """

    name: str
    needs: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
    first: str = "hidden_states"
    keys: str = ""
    values: str = ""
    rotation: str = ""
    rotation_k: str = ""
    tables: str = "cos_sin"
    rope: tuple[str, ...] = ()
    function: str = ""
    both: bool = False
    positions: str = "coordinates"
    places: str = ""
    own_table: bool = False
    excluded: str = ""
    groups: str = ""
    bounds: str = ""
    returns: str = "tuple"
    mask: str = "attention_mask"
    method: str = ""
    qkv: tuple[str, ...] = ()
    out: str = ""
    heads: str = ""
    head_dim: str = ""
    scale: str = ""
    anywhere: bool = False

    @property
    def calls(self) -> bool:
        """Return whether it rotates by a callable of its own."""
        return self.tables == "positions"

    def check(self) -> None:
        """Raise unless the fields fit together."""
        for field in ("needs", "takes"):
            if not isinstance(getattr(self, field), frozenset | set):
                raise TypeError(f"{field} must be a frozenset of names, got {getattr(self, field)!r}")
        if self.tables not in TABLES:
            raise ValueError(f"tables must be one of {TABLES}, got {self.tables!r}")
        if self.returns not in RETURNS:
            raise ValueError(f"returns must be one of {RETURNS}, got {self.returns!r}")
        if len(self.qkv) not in (0, 1, 3):
            raise ValueError(f"qkv must name one fused projection or three, got {self.qkv!r}")
        if self.calls != bool(self.rope or self.function):
            raise ValueError(f"rope={self.rope!r} and tables={self.tables!r} do not fit: positions need a callable")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {self.positions!r}")
        if bool(self.keys) != bool(self.values):
            raise ValueError(f"keys={self.keys!r} and values={self.values!r} must both be given, or neither")
        arguments = {*self.needs, *self.takes}
        named = ("rotation_k", "bounds", "keys", "values", "excluded", "groups")
        for field in named if self.own_table else ("rotation", *named):
            if (name := getattr(self, field)) and name not in arguments:
                raise ValueError(f"{field}={name!r} must be among the arguments in needs or takes")
        if self.first in arguments:
            raise ValueError(f"first={self.first!r} must not be in needs or takes, which name the other arguments")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPTIONS = "attention_mask output_attentions past_key_value past_key_values cache"

FORMS = [
    ForwardForm(
        "packed",
        needs=_names("cu_seqlens position_embeddings"),
        takes=_names(f"cu_seqlens position_embeddings rotary_pos_emb max_seqlen {_OPTIONS}"),
        rotation="position_embeddings",
        bounds="cu_seqlens",
        returns="tensor",
    ),
    ForwardForm(  # Qwen2.5-Omni in transformers 4
        "packed, from angles",
        needs=_names("cu_seqlens rotary_pos_emb"),
        takes=_names("cu_seqlens rotary_pos_emb"),
        rotation="rotary_pos_emb",
        tables="angles",
        bounds="cu_seqlens",
        returns="tensor",
    ),
    ForwardForm(
        "packed without RoPE",
        needs=_names("cu_seqlens"),
        takes=_names(f"cu_seqlens max_seqlen {_OPTIONS}"),
        bounds="cu_seqlens",
        returns="tensor",
    ),
    ForwardForm(
        "batched",
        needs=_names("position_embeddings"),
        takes=_names(f"position_embeddings position_ids {_OPTIONS}"),
        rotation="position_embeddings",
    ),
    ForwardForm(
        "complex",
        needs=_names("freqs_ci"),
        takes=_names(f"freqs_ci {_OPTIONS}"),
        rotation="freqs_ci",
        tables="complex",
    ),
    ForwardForm(
        "timm",
        needs=_names("rope"),
        takes=_names("rope attn_mask is_causal"),
        first="x",
        rotation="rope",
        tables="sin_cos_cat",
        returns="tensor",
        mask="attn_mask",
    ),
    ForwardForm(
        "timm without RoPE",
        needs=_names("attn_mask"),
        takes=_names("attn_mask is_causal"),
        first="x",
        returns="tensor",
        mask="attn_mask",
    ),
    ForwardForm(
        "plain",
        needs=_names(""),
        takes=_names(f"causal_attention_mask head_mask {_OPTIONS}"),
    ),
    # of the original code of many vision transformers, which transformers and timm rewrote
    ForwardForm("tokens alone", takes=_names("attn_bias"), first="x", returns="tensor", mask="attn_bias"),
    ForwardForm(  # CroCo, DUSt3R, MASt3R, CUT3R, MonST3R; MapAnything names its callable otherwise
        "positions",
        needs=_names("xpos"),
        takes=_names("xpos"),
        first="x",
        rotation="xpos",
        tables="positions",
        rope=("rope", "custom_positional_encoding"),
        returns="tensor",
        anywhere=True,
    ),
    ForwardForm(  # VGGT, pi3, Depth Anything 3
        "positions, masked",
        needs=_names("pos"),
        takes=_names("pos attn_mask"),
        first="x",
        rotation="pos",
        tables="positions",
        rope=("rope",),
        returns="tensor",
        mask="attn_mask",
        anywhere=True,
    ),
    ForwardForm(  # vit-pytorch
        "positions in blocks",
        needs=_names("pos block_mask mask_fn"),
        takes=_names("pos block_mask mask_fn"),
        first="x",
        rotation="pos",
        tables="positions",
        rope=("rotary_emb",),
        returns="tensor",
        mask="block_mask",
        anywhere=True,
    ),
    ForwardForm(  # Step3-VL
        "positions of a grid",
        needs=_names("grid_hw"),
        takes=_names("grid_hw"),
        rotation="grid_hw",
        tables="positions",
        rope=("rope",),
        both=True,
        positions="grid",
        returns="tensor",
        anywhere=True,
    ),
    ForwardForm(  # V-JEPA 2
        "positions by itself",
        needs=_names("position_mask"),
        takes=_names("position_mask output_attentions head_mask"),
        rotation="position_mask",
        tables="positions",
        rope=("apply_rotary_embeddings",),
        places="get_position_ids",
        anywhere=True,
    ),
    ForwardForm(  # OneVision, LLaVA-OneVision-2
        "angles of channels",
        needs=_names("rotary_pos_emb"),
        takes=_names("attention_mask rotary_pos_emb output_attentions"),
        rotation="rotary_pos_emb",
        tables="positions",
        function="apply_rotary_pos_emb",
        both=True,
        positions="angles",
    ),
    ForwardForm(  # MoonViT: Kimi-VL
        "packed, in a layer",
        needs=_names("cu_seqlens rope_freqs_cis"),
        takes=_names("cu_seqlens rope_freqs_cis"),
        first="x",
        rotation="rope_freqs_cis",
        tables="complex",
        bounds="cu_seqlens",
        returns="tensor",
        method="attention_qkvpacked",
        qkv=("wqkv",),
        out="wo",
        head_dim="hidden_size_per_attention_head",
    ),
    ForwardForm(  # Keye-VL, PaddleOCR-VL's own code
        "packed, rope_emb",
        needs=_names("cu_seqlens rope_emb"),
        takes=_names("cu_seqlens rope_emb attention_mask output_attentions"),
        rotation="rope_emb",
        bounds="cu_seqlens",
    ),
    ForwardForm(  # the decoders of CroCo, DUSt3R, ...
        "two views",
        needs=_names("key value qpos kpos"),
        takes=_names("key value qpos kpos"),
        first="query",
        keys="key",
        values="value",
        rotation="qpos",
        rotation_k="kpos",
        tables="positions",
        rope=("rope", "custom_positional_encoding"),
        returns="tensor",
        anywhere=True,
    ),
    ForwardForm(  # SAM 2 as transformers has it; its self-attention in EdgeTAM takes no numbers
        "memory",
        needs=_names("key value position_embeddings"),
        takes=_names("key value position_embeddings num_k_exclude_rope"),
        first="query",
        keys="key",
        values="value",
        rotation="position_embeddings",
        excluded="num_k_exclude_rope",
        anywhere=True,
    ),
    ForwardForm(  # EdgeTAM
        "memory in groups",
        needs=_names("key value position_embeddings position_embeddings_k num_k_exclude_rope rope_k_repeat"),
        takes=_names("key value position_embeddings position_embeddings_k num_k_exclude_rope rope_k_repeat"),
        first="query",
        keys="key",
        values="value",
        rotation="position_embeddings",
        rotation_k="position_embeddings_k",
        excluded="num_k_exclude_rope",
        groups="rope_k_repeat",
        anywhere=True,
    ),
    ForwardForm(  # SAM 2's own code
        "memory, complex",
        needs=_names("k v num_k_exclude_rope"),
        takes=_names("k v num_k_exclude_rope"),
        first="q",
        keys="k",
        values="v",
        rotation="freqs_cis",
        own_table=True,
        tables="complex",
        excluded="num_k_exclude_rope",
        returns="tensor",
        anywhere=True,
    ),
    ForwardForm(  # torch.nn.MultiheadAttention: open_clip, torchvision, OpenAI's clip
        "torch",
        needs=_names("key value key_padding_mask need_weights attn_mask"),
        takes=_names("key value key_padding_mask need_weights attn_mask average_attn_weights is_causal"),
        first="query",
        keys="key",
        values="value",
        mask="attn_mask",
        qkv=("in_proj_weight",),
    ),
]


BUILT_IN = frozenset(form.name for form in FORMS)


def attention_method(cls: type) -> str:
    """Return the name of the method of a class that is attention."""
    return next((form.method for form in FORMS if form.method and hasattr(cls, form.method)), "forward")


def register_form(form: ForwardForm) -> None:
    """Add the form of an attention class of one's own, for ``patch`` and ``inspect`` in this process.

    Modules of this form are patched where the proof succeeds, as those of any class that is not part of the tests: the
    patched forward must compute what the original one does. Forms that were registered last are tried first; one of the
    same name is replaced.

    Raises:
        TypeError, ValueError: a field that does not fit the others, or the name of one of the package's own forms.
    """
    if not isinstance(form, ForwardForm):
        raise TypeError(f"form must be a spatial_pe.towers.ForwardForm, got {type(form).__name__}")
    form.check()
    if form.name in BUILT_IN:
        raise ValueError(f"a form named {form.name!r} exists already: choose another name")
    FORMS[:] = [form, *(other for other in FORMS if other.name != form.name)]


class Known(NamedTuple):
    """Properties of a tested class that its form leaves open."""

    pairing: str = "half"  # or OWN
    returns: str | None = None  # None: as its form
    pads: bool = False  # its tower pads, masks the padding, and drops what attention returns for it


# Attention classes that tests/towers run, on the oldest and the newest supported transformers where they exist there.
# x.Y is transformers.models.x.modeling_x.Y
_HALF = """
    qwen2_vl.VisionAttention qwen2_5_vl.Qwen2_5_VLVisionAttention qwen3_vl.Qwen3VLVisionAttention
    qwen3_vl_moe.Qwen3VLMoeVisionAttention qwen3_5.Qwen3_5VisionAttention qwen3_5_moe.Qwen3_5MoeVisionAttention
    qwen4_exp.Qwen4ExpVisionAttention qwen3_omni_moe.Qwen3OmniMoeVisionAttention
    qwen2_5_omni.Qwen2_5OmniVisionAttention glm4v.Glm4vVisionAttention glm4v_moe.Glm4vMoeVisionAttention
    glm_ocr.GlmOcrVisionAttention glm5_next.Glm5NextVisionAttention dots3_note.Dots3NoteVisionAttention
    cohere_compass.CohereCompassVisionAttention exaone4_5.Exaone4_5_VisionAttention
    ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention kimi_k25.Kimi_K25VisionAttention
    muse_glimmer.MuseGlimmerVisionAttention muse_spark.MuseSparkVisionAttention pixtral.PixtralAttention
    dinov3_vit.DINOv3ViTAttention eomt_dinov3.EomtDinov3Attention sapiens2.Sapiens2Attention
    step3p7.Step3p7VisionAttention mlcd.MLCDAttention glm_image.GlmImageVisionAttention
    cosmos3_edge.Cosmos3EdgeVisionAttention
"""
_PLAIN = """
    clip.CLIPAttention altclip.AltCLIPAttention chinese_clip.ChineseCLIPVisionAttention
    metaclip_2.MetaClip2Attention x_clip.XCLIPAttention kosmos2.Kosmos2VisionAttention git.GitVisionAttention
    owlvit.OwlViTAttention siglip.SiglipAttention janus.JanusVisionAttention aimv2.Aimv2Attention
    ovis2.Ovis2VisionAttention ovis2.Ovis2Attention internvl.InternVLVisionAttention
    qianfan_ocr.QianfanOCRVisionAttention idefics3.Idefics3VisionAttention smolvlm.SmolVLMVisionAttention
    granite_docling.GraniteDoclingVisionAttention dinov2.Dinov2Attention dinov2.Dinov2SelfAttention
    dinov2_with_registers.Dinov2WithRegistersAttention dinov2_with_registers.Dinov2WithRegistersSelfAttention
    vit.ViTAttention vit.ViTSelfAttention ijepa.IJepaAttention ijepa.IJepaSelfAttention vit_msn.ViTMSNAttention
    vit_msn.ViTMSNSelfAttention vit_mae.ViTMAEAttention vit_mae.ViTMAESelfAttention deit.DeiTAttention
    deit.DeiTSelfAttention yolos.YolosSelfAttention pixio.PixioAttention tipsv2.Tipsv2VisionAttention
    owlv2.Owlv2Attention clipseg.CLIPSegAttention rf_detr.RfDetrDinov2Attention dpt.DPTSelfAttention dpt.DPTViTAttention
    vitpose_backbone.VitPoseBackboneSelfAttention vitpose_backbone.VitPoseBackboneAttention
    videomae.VideoMAESelfAttention videomae.VideoMAEAttention vivit.VivitAttention vivit.VivitSelfAttention
    lw_detr.LwDetrViTAttention
"""
_HALF_TUPLE = """
    paddleocr_vl.PaddleOCRVisionAttention video_llama_3.VideoLlama3VisionAttention lfm3_vl.Lfm3VlVisionAttention
    minimax_m3_vl.MiniMaxM3VLVisionAttention hunyuan_vl.HunYuanVLVisionAttention
    minicpmv4_6.MiniCPMV4_6VisionAttention minicpmv4_7.MiniCPMV4_7VisionAttention
    minicpm_ocr.MiniCPMOcrVisionAttention hy_v4_vl.HYV4VLVisionAttention
"""
_PADDING = """
    siglip2.Siglip2Attention idefics2.Idefics2VisionAttention
"""


def _of_transformers(classes: str, known: Known) -> dict[str, Known]:
    pairs = (entry.split(".") for entry in classes.split())
    return {f"transformers.models.{family}.modeling_{family}.{name}": known for family, name in pairs}


TESTED: dict[str, Known] = {
    **_of_transformers(_HALF, Known()),
    **_of_transformers(_HALF_TUPLE, Known(returns="tuple")),
    **_of_transformers(_PLAIN, Known()),
    **_of_transformers(_PADDING, Known(pads=True)),
    **_of_transformers("inkling2.Inkling2VisionAttention", Known("interleaved", returns="tuple")),
    **_of_transformers("radio.RadioAttention", Known(returns="tuple")),
    **_of_transformers("llama4.Llama4VisionAttention sam3.Sam3ViTRoPEAttention", Known("interleaved")),
    **_of_transformers("gemma4.Gemma4VisionAttention", Known("axis_half", pads=True)),
    **_of_transformers(
        """
        sam2_video.Sam2VideoRoPEAttention sam3_tracker_video.Sam3TrackerVideoRoPEAttention
        edgetam_video.EdgeTamVideoRoPESelfAttention edgetam_video.EdgeTamVideoRoPECrossAttention
        """,
        Known("interleaved"),
    ),
    **_of_transformers("vjepa2.VJEPA2RopeAttention", Known(OWN)),
    "sam2.modeling.sam.transformer.RoPEAttention": Known("interleaved"),
    "torch.nn.modules.activation.MultiheadAttention": Known(),
    "timm.layers.attention.Attention": Known(pads=True),
    "timm.layers.attention.AttentionRope": Known("interleaved", pads=True),
    "timm.models.eva.EvaAttention": Known("interleaved", pads=True),
}


def tested(cls: type) -> Known | None:
    """Return the properties of a tested class, or None for other classes."""
    return TESTED.get(f"{cls.__module__}.{cls.__qualname__}")


# Attention that has a known form but is different: by class, with the reason for the report.
LEFT_ALONE: dict[str, str] = {
    "Phi4MultimodalVisionAttention": "is_causal is True: with no padding its SDPA runs causal, which bidirectional "
    "attention would change",
}

# Attention over tokens that are not a grid of patches after a prefix: no RoPE is added to it.
_SHUFFLED = "its tokens are a shuffled part of the patches"
NO_GRID: dict[str, str] = {
    "ViTMAEAttention": _SHUFFLED,
    "ViTMAESelfAttention": _SHUFFLED,
    "XCLIPAttention": "it adds a token after the patches, and attends over frames",
}
