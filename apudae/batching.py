"""The one place that cuts a batch: into parts that fit, and into halves where one does not fit into memory."""

import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

# numbers in a part at most: images of 224×224 one by one on a CPU and 111 on CUDA, of 32×32 85 and 5461
MEMORY = {"cpu": 2**18, "cuda": 2**24}
# what runs out of memory says, beside torch.OutOfMemoryError: the CPU's allocator, Apple's, cuBLAS, cuDNN
SHORT = re.compile(
    r"allocate memory|not enough memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
)
CACHE = {"cpu": 2**16, "cuda": 2**24}  # what the CPU's caches like where a part is read again and again


def parts(x: Tensor, numbers: dict[str, int] = MEMORY, batch_size: int | None = None) -> tuple[Tensor, ...]:
    """`x` in parts of at most so many `numbers`, by the kind of its device, and of at most `batch_size` images."""
    fitting = max(1, numbers.get(x.device.type, 2**24) // max(1, x.shape[1:].numel()))
    return x.split(min(fitting, batch_size or fitting))


def in_batches(
    function: Callable[..., Tensor],
    *tensors: Tensor,
    batch_size: int | None = 256,
    numbers: dict[str, int] = MEMORY,
    name: str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`function(*tensors)` part by part, as `parts` cuts the first of them; a part that does not fit is halved.

    `generator`, from which `function` draws, is set back before a part is tried again. With a `name`, a progress bar of
    that name from two seconds on.
    """
    size = len(parts(tensors[0], numbers, batch_size)[0])
    batches = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    count = math.ceil(len(tensors[0]) / size)
    batches = progress(batches, desc=name, total=count, disable=name is None)
    return torch.cat([_in_halves(function, *batch, generator=generator) for batch in batches])


def progress(steps: Iterable, **about: Any) -> tqdm:
    """`steps` with a bar of text that comes after two seconds and goes when it is done; `about` is for tqdm.

    In a live notebook it goes to the cell's plain output, as stderr is red there; else to stderr, which a command that
    runs a notebook passes on. No widget: each of thousands of short loops would send a dozen messages for it.
    """
    kernel = sys.modules.get("ipykernel.kernelapp")  # a process that starts kernels may have it, too
    live = kernel and kernel.IPKernelApp.initialized() and "APUDAE_COMMAND" not in os.environ
    place = {"file": sys.stdout} if live else {}
    return tqdm(steps, **{"delay": 2, "leave": False} | place | about)


def _in_halves(function: Callable[..., Tensor], *tensors: Tensor, generator: torch.Generator | None) -> Tensor:
    """`function(*tensors)`; a batch too large for the memory is halved, `generator` set back, and tried again."""
    state = None if generator is None else generator.get_state()
    size = len(tensors[0])
    try:
        return function(*tensors)
    except RuntimeError as error:  # the CPU's has no class of its own
        short = isinstance(error, torch.OutOfMemoryError) or SHORT.search(str(error))
        if not short or size == 1:
            raise
    warnings.warn(f"a batch of {size} images does not fit into memory: trying its halves", stacklevel=4)
    if generator is not None:
        generator.set_state(state)
    halves = zip(*(tensor.split((size + 1) // 2) for tensor in tensors), strict=True)
    return torch.cat([_in_halves(function, *half, generator=generator) for half in halves])
