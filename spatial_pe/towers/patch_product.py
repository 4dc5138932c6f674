# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings that are convolutions over disjoint patches, computed as the matrix product that they are.

Qwen2-VL and its relatives embed patches that are already cut by a Conv3d whose kernel is as large as its input, so that
each output is one position. As a convolution it takes 5 times as long as the product on a CPU (float32; 30 times and
more in bfloat16 with AMX). Parameters, state dict and class (``isinstance``) stay.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._utils.dispatcher import fx_node
from .classes import Swapped


class PatchProduct(Swapped):
    """Convolution over disjoint patches, a matrix product where its input is one patch for each sample.

    Base of ``class Patched<Original>(PatchProduct, <Original>)``, see ``swapped_class``. Any other input, e.g. a whole
    video, is left to the original forward.
    """

    weight: Tensor
    bias: Tensor | None
    kernel_size: tuple[int, ...]

    def forward(self, x: Tensor) -> Any:
        if (node := fx_node(self, x)) is not None:
            return node
        if x.shape[2:] != self.kernel_size:
            return super().forward(x)
        product = nn.functional.linear(x.flatten(1), self.weight.flatten(1), self.bias)
        return product.view(*product.shape, *(1 for _ in self.kernel_size))
