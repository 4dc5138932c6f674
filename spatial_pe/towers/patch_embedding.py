# SPDX-License-Identifier: Apache-2.0
"""Recognition of patch embeddings that are a matrix product, and its proof."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .grid_hooks import is_patch_convolution
from .patch_product import PatchProduct
from .swap import swap_refusal


def product_refusal(module: nn.Module) -> str | None:
    """Return why a patch embedding is not computed as a product, or None."""
    if isinstance(module, PatchProduct):
        return "already patched"
    if type(module) is not nn.Conv3d or not is_patch_convolution(module):
        return "it is no convolution whose kernel is its stride"
    if any(module.padding) or any(d != 1 for d in module.dilation) or module.groups != 1:
        return "it pads, dilates or has groups"
    return swap_refusal(module)


def product_errors(module: nn.Conv3d) -> tuple[float, float] | str:
    """Return the errors of the product and of the convolution in the module's dtype, relative to float64, on random
    patches; or why it cannot be run."""
    weight = module.weight.detach()
    if weight.is_meta:
        return "its weights are not in memory"
    if type(weight) is not Tensor:  # sharded by FSDP
        return f"its weight is a {type(weight).__name__}"
    generator = torch.Generator().manual_seed(0)
    shape = (4, module.in_channels, *module.kernel_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(weight.device, weight.dtype)
    bias = None if module.bias is None else module.bias.detach()
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        exact = _product(*(None if t is None else t.double() for t in (x, weight, bias)))  # type: ignore[arg-type]
        ours = _product(x, weight, bias)
        theirs = nn.functional.conv3d(x, weight, bias, module.stride).flatten(1)
    return _distance(ours, exact), _distance(theirs, exact)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x.flatten(1), weight.flatten(1), bias)


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())
