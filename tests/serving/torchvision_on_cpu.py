# SPDX-License-Identifier: Apache-2.0
"""Lets torchvision's wheel, which is for CUDA, be imported beside a torch for the CPU: it describes two operators that
its library would define. `make serving` puts this on the path of an environment and imports it in every process."""

import sys


class _Before:
    """Finds nothing; defines the operators when torchvision is asked for."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            import torch

            for operator in ("nms", "qnms"):
                schema = f"torchvision::{operator}"
                torch.library.define(schema, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Before())  # type: ignore[arg-type]
