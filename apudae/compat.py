"""Lets torchvision be imported beside a torch that cannot load its compiled operators; `apudae` imports it first.

A CPU build of torch beside a torchvision built for CUDA stops at `import torchvision` with "operator torchvision::nms
does not exist". Declaring the two schemas is enough, as apudae calls neither operator; elsewhere nothing is done.
"""

import importlib.util
from contextlib import suppress
from pathlib import Path

import torch

for _library in Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*"):
    with suppress(OSError):  # built for another torch: its operators stay missing
        torch.ops.load_library(_library)
if not hasattr(torch.ops.torchvision, "nms"):
    _fragment = torch.library.Library("torchvision", "FRAGMENT")  # kept alive: the schemas go when it goes
    _fragment.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _fragment.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
