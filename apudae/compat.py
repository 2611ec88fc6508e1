"""Lets torchvision be imported beside a torch that cannot load its compiled operators; `apudae` imports it first."""

import importlib.util
from pathlib import Path

import torch


def _declare_missing_operators() -> torch.library.Library | None:
    """Let torchvision be imported beside a torch that cannot load its compiled operators; elsewhere do nothing.

    A CPU build of torch beside a torchvision built for CUDA stops at `import torchvision` with "operator
    torchvision::nms does not exist". Declaring the two schemas is enough, as apudae calls neither operator.
    """
    for library in Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(library)
        except OSError:  # built for another torch: its operators stay missing
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    fragment.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    fragment.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return fragment


_fragment = _declare_missing_operators()  # kept alive: the schemas go when it goes
