"""Training in several processes that share each batch, one for each GPU."""

import copy
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.utils.data import Dataset

from ..contracts import check_whole
from ..processes import die_with_parent


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
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    with tempfile.TemporaryDirectory() as folder:
        job = (processes, os.getpid(), f"file://{folder}/meeting", kind, train, model, dataset, recipe, options)
        arguments = {rank: (rank, *job) for rank in range(processes)}
        variables = {rank: dict(loopback) for rank in arguments}
        # not elastic_launch, which calls this: its agent opens a port to every network, even with a file to meet in
        workers = start_processes("training", _work, arguments, variables, DefaultLogsSpecs(folder))
        try:
            for number, handler in handlers.items():
                if signal.getsignal(number) != handler:  # torch's would take Ctrl-C from a notebook for good
                    signal.signal(number, handler)
            result = workers.wait(period=0.1)
        finally:
            workers.close(signal.SIGKILL)
        if result.is_failed():
            raise ChildFailedError("training", result.failures)
    outcome = result.return_values[0]
    if isinstance(outcome, str):
        raise ValueError(outcome)
    model.to(device).eval()
    return outcome


def _work(rank: int, processes: int, parent: int, meeting: str, kind: str, train: Callable, *job: Any) -> list | str:
    """One of the processes: train a copy of the model. Its curve, or the text of its ValueError."""
    die_with_parent(parent)
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    device = torch.device(kind, rank if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", meeting, rank=rank, world_size=processes)
    shared, dataset, recipe, options = job
    own = copy.deepcopy(shared)
    try:
        outcome = train(own, dataset, recipe, device=device, **options)
    except ValueError as error:  # every process meets the same
        outcome = str(error)
    if rank == 0:
        shared.load_state_dict(own.state_dict())
    dist.destroy_process_group()
    return outcome


def rank_and_world_size() -> tuple[int, int]:
    """Which process this is, of how many."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shared_draw(draw: Callable[..., Tensor], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """`draw` of `shape`, an entry for each image; drawn for the whole batch, of which this process keeps its share."""
    rank, processes = rank_and_world_size()
    whole = draw((shape[0] * processes, *shape[1:]), generator=generator, device=generator.device)
    return whole[rank * shape[0] : (rank + 1) * shape[0]]


def shared_statistics(model: nn.Module) -> nn.Module:
    """A copy of `model` whose batch normalisations use the whole batch that the processes share."""
    model = copy.deepcopy(model)
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.BatchNorm2d:
            shared = SharedBatchNorm(layer.num_features, layer.eps, layer.momentum).to(layer.weight)
            shared.load_state_dict(layer.state_dict())
            model.set_submodule(name, shared)
    return model


class SharedBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm, which refuses CPUs, for CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x, count = x.to(self.weight.dtype), x.numel() / x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum((0, 2, 3)), "sum", dist.group.WORLD) / count
        centred = x - mean[:, None, None]
        var = all_reduce(centred.square().sum((0, 2, 3)), "sum", dist.group.WORLD) / count
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        self.num_batches_tracked += 1
        return centred * ((var + self.eps).rsqrt() * self.weight)[:, None, None] + self.bias[:, None, None]
