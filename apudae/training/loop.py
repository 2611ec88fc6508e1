"""One resumable training loop, `fit`, in one process or several that share each batch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from ..batching import progress
from ..contracts import check_at_least, check_whole
from ..datasets.imagenet import readers
from .distributed import rank_and_world_size, shared_statistics
from .state import keep_training, restore_training, whose

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train: `steps` batches of `batch_size`, Adam with warm-up (a tenth) and cosine to zero, one `seed`.

    `weight_decay` is AdamW's. With an `ema_decay` above 0 the trained weights are their exponential moving average.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    weight_decay: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        check_whole(1, steps=self.steps, batch_size=self.batch_size)
        check_whole(0, seed=self.seed)
        check_at_least(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay, ema_decay=self.ema_decay)
        if self.ema_decay >= 1:
            raise ValueError(f"ema_decay is {self.ema_decay!r}; needed: a number below 1, such as 0.999")


def fit(
    model: nn.Module,
    loss: Loss,
    dataset: Dataset,
    recipe: Recipe,
    *,
    run_dir: Path | None = None,
    device: str | torch.device = "cpu",
    about: dict | None = None,
    save_every: int | None = None,
) -> list[dict[str, float]]:
    """Minimise `loss(model, x, y, generator)` over shuffled batches of `dataset`; the model ends in eval mode.

    With `run_dir`, weights and optimiser are kept every `save_every` steps (by default a twentieth, at most 200). A
    killed run goes on from there to the result it would have had: batches and noise of a step depend on seed and step
    alone. A `run_dir` that belongs to another recipe, model, first weights, data set (its size and some of its images)
    or loss (`about`) is a ValueError.
    Colour images (a fifth faster so, even on a CPU) and CUDA: channels-last, and bfloat16 autocast where the processor
    has it (twice as fast). Several processes (`in_processes`): `x`, `y` are a share of the batch, and `loss` calls
    `model` once, `bare(model)` for all else.
    """
    device, (rank, processes) = torch.device(device), rank_and_world_size()
    save_every = save_every or max(1, min(200, recipe.steps // 20))
    layout, half = _layout_and_half(dataset, device)
    model.to(device, memory_format=layout).train()
    network = shared_statistics(model) if processes > 1 else model
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    networks = nn.ModuleDict({"model": network})
    if recipe.ema_decay:
        networks["average"] = AveragedModel(
            network, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True
        )
    identity = whose(dataset, model, recipe=asdict(recipe), about=about, model=model.architecture)
    state = None if run_dir is None else Path(run_dir) / "state.safetensors"
    start, curve = restore_training(state, networks, optimizer, identity)
    called = DistributedDataParallel(network) if processes > 1 else network
    batches = DataLoader(dataset, batch_sampler=Batches(len(dataset), recipe, start), num_workers=readers(dataset))
    bar = progress(batches, initial=start, total=recipe.steps, desc="train", disable=rank > 0)
    total = torch.zeros((), device=device)
    for step, (x, y) in enumerate(bar, start=start):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe.steps)
        generator = torch.Generator(device).manual_seed(step_seed(recipe.seed, 1, step))
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            value = loss(called, x, y, generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if recipe.ema_decay:
            networks["average"].update_parameters(network)
        total += value.detach()
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            if processes > 1:
                dist.all_reduce(total)
            since = step + 1 - (curve[-1]["step"] if curve else 0)
            curve.append({"step": step + 1, "loss": total.item() / processes / since})
            total.zero_()
            bar.set_postfix(loss=f"{curve[-1]['loss']:.5f}")
            if not math.isfinite(curve[-1]["loss"]):
                raise ValueError(f"the loss is {curve[-1]['loss']} at step {step + 1}; give a smaller learning_rate")
            keep_training(None if rank else state, networks, optimizer, identity, curve)
    model.load_state_dict((networks["average"].module if recipe.ema_decay else network).state_dict())
    model.eval()
    return curve


def bare(model: nn.Module) -> nn.Module:
    """The network without what averages its gradients over the processes, which is for one call in each step."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _layout_and_half(dataset: Dataset, device: torch.device) -> tuple[torch.memory_format, bool]:
    """Memory layout of the weights, and whether bfloat16 autocast is faster."""
    large = len(dataset[0][0]) > 1 or device.type == "cuda"
    half = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.channels_last if large else torch.contiguous_format, large and half


class Batches:
    """Index lists of the steps from `start` on: a fresh permutation each epoch, the last short batch dropped.

    Of each batch, this process's share.
    """

    def __init__(self, n: int, recipe: Recipe, start: int) -> None:
        if n < recipe.batch_size:
            raise ValueError(
                f"the training set has {n} images; needed: at least one batch of {recipe.batch_size}; "
                f"give batch_size = {n}, or less"
            )
        rank, processes = rank_and_world_size()
        if recipe.batch_size % processes:
            raise ValueError(f"batch_size is {recipe.batch_size}; needed: a multiple of the {processes} processes")
        self.n, self.recipe, self.start = n, recipe, start
        share = recipe.batch_size // processes
        self.share = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.recipe.steps - self.start

    def __iter__(self) -> Iterator[list[int]]:
        size, order, shuffled = self.recipe.batch_size, None, -1
        for step in range(self.start, self.recipe.steps):
            epoch, batch = divmod(step, self.n // size)
            if epoch != shuffled:
                generator = torch.Generator().manual_seed(step_seed(self.recipe.seed, 0, epoch))
                order, shuffled = torch.randperm(self.n, generator=generator, device="cpu").tolist(), epoch
            yield order[batch * size : (batch + 1) * size][self.share]


def step_seed(seed: int, stream: int, index: int) -> int:
    """A seed for step or epoch `index`, other ones for each `stream`."""
    return (seed * 2 + stream) * 1_000_003 + index


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (steps / 10)) * 0.5 * (1 + math.cos(math.pi * step / steps))
