"""Training in several processes that share each batch, one for each GPU; and dying with one's parent."""

import copy
import ctypes
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.utils.data import Dataset

from ..contracts import check_whole


def in_processes(
    processes: int,
    train: Callable[..., list[dict[str, float]]],
    model: nn.Module,
    dataset: Dataset,
    recipe: Any,
    *,
    device: str | torch.device = "cpu",
    **options: Any,
) -> list[dict[str, float]]:
    """`train(model, dataset, recipe, device=device, **options)` in this process, or in `processes` new ones together.

    `train` is train_dae or another function of a module. Weights and curve are those of one process, up to rounding.
    CUDA: a GPU for each process (NCCL); CPU: gloo. ValueError for fewer GPUs, or a batch that cannot be shared evenly.
    """
    check_whole(1, processes=processes)
    if processes == 1:
        return train(model, dataset, recipe, device=device, **options)
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.device_count() < processes:
        raise ValueError(f"{processes} processes need a GPU each; there are {torch.cuda.device_count()} here")
    model.cpu().share_memory()  # the first worker leaves the trained weights there
    with tempfile.TemporaryDirectory() as folder:
        job = (processes, os.getpid(), folder, kind, train, model, dataset, recipe, options)
        start = torch.multiprocessing.start_processes  # not fork: CUDA and OpenMP do not survive it
        workers = start(_work, job, nprocs=processes, join=False, daemon=True, start_method="spawn")
        try:
            while not workers.join():
                pass
        finally:
            for worker in workers.processes:
                worker.kill()
        outcome = json.loads(Path(folder, "outcome.json").read_text())
    if "error" in outcome:
        raise ValueError(outcome["error"])
    model.to(device).eval()
    return outcome["curve"]


def _work(rank: int, processes: int, parent: int, folder: str, kind: str, train: Callable, *job: Any) -> None:
    """One of the processes: train a copy of the model; the first hands over curve and weights, or the error."""
    die_with_parent(parent)
    if sys.platform == "linux":  # they meet in a file and talk over loopback: no port is open to others
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    device = torch.device(kind, rank if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    meeting = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": processes}
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", **meeting)
    shared, dataset, recipe, options = job
    own = copy.deepcopy(shared)
    try:
        outcome = {"curve": train(own, dataset, recipe, device=device, **options)}
    except ValueError as error:  # every process meets the same
        outcome = {"error": str(error)}
    if rank == 0:
        shared.load_state_dict(own.state_dict())
        Path(folder, "outcome.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


def place() -> tuple[int, int]:
    """Which process this is, of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def drawn(draw: Callable[..., Tensor], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """`draw` of `shape`, an entry for each image; drawn for the whole batch, of which this process keeps its share."""
    rank, processes = place()
    whole = draw((shape[0] * processes, *shape[1:]), generator=generator, device=generator.device)
    return whole[rank * shape[0] : (rank + 1) * shape[0]]


def average(tensors: list[Tensor]) -> None:
    """Average each tensor over the processes, in place. Not DistributedDataParallel: it runs a model once a step."""
    processes = place()[1]
    if processes > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])  # one message
        dist.all_reduce(flat)
        for tensor, mean in zip(tensors, (flat / processes).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))


def share_statistics(model: nn.Module) -> None:
    """Have the batch normalisations of `model` use the whole batch, where several processes share it."""
    for part in model.modules() if place()[1] > 1 else []:
        if type(part) is nn.BatchNorm2d:
            part.__class__ = SharedBatchNorm


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation with mean and variance of the whole batch, as nn.SyncBatchNorm, which is for GPUs alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x, count = x.to(self.weight.dtype), x.numel() / x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3)), "sum", dist.group.WORLD) / count
        centred = x - mean[:, None, None]
        var = all_reduce(centred.square().sum((0, 2, 3)), "sum", dist.group.WORLD) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return centred * ((var + self.eps).rsqrt() * self.weight)[:, None, None] + self.bias[:, None, None]


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process when `parent`, which started it, dies, even by kill -9: no orphans."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before the call
            os._exit(1)
