"""What each process of a data-parallel training does: no more than pyllama is imported there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import pyllama
from pyllama.balance import new_loads, update_correction_biases
from pyllama.config import MoEConfig
from pyllama.model import Model

PROCESSES = 2
STEPS = 4


def plain(model: Model) -> nn.Module:
    return model


def sharded(model: Model) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[Model], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp2": sharded}
# The name of a checkpoint, and how it is trained.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {},  # a load-balancing loss
    "deepseek_v2 by sequence": {},  # its load-balancing losses
    "deepseek_v2 by batch": {},
    "deepseek_v3": {},  # correction biases
    "qwen2_moe": {"activation_checkpointing": True},
}


def mixed(model: Model) -> nn.Module:
    """In bfloat16, but for correction biases, which decide who is chosen."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    biases = {parameter for name, parameter in model.named_parameters() if name.endswith("correction_bias")}
    for module in (*model.layers, model):
        fully_shard(module, mp_policy=policy, ignored_params=biases)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels, of which the second process has fewer."""
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(211, (STEPS, 4, 12), generator=generator)
    ignored = torch.rand(token_ids.shape, generator=generator) < torch.tensor([0.0, 0.1, 0.8, 0.8])[:, None]
    return list(zip(token_ids, token_ids.masked_fill(ignored, -100), strict=True))


def train(model: Model, wrap: Callable[[Model], nn.Module], rank: int, processes: int, **options: Any) -> list[float]:
    """Some steps on this process's share of each batch: the losses of all of it."""
    for name, parameter in model.named_parameters():
        if name.endswith("correction_bias"):  # its random start would choose the experts alone
            torch.nn.init.zeros_(parameter)
    wrapped = wrap(model.train())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    group = dist.group.WORLD if processes > 1 else None
    ffns = [layer.ffn for layer in model.config.layers]
    corrected = any(isinstance(ffn, MoEConfig) and ffn.correction_bias for ffn in ffns)
    losses = []
    for all_ids, all_labels in batches():
        token_ids, labels = all_ids.chunk(processes)[rank], all_labels.chunk(processes)[rank]
        loads = new_loads(model.config) if corrected else None
        mean = (all_labels[:, 1:] != -100).sum() / processes
        output = wrapped(token_ids, labels=labels, num_labels=mean, loads=loads, balance_group=group, **options)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loads is not None:
            update_correction_biases(model, loads, rate=0.1)
        loss = output.loss.detach() / processes
        if processes > 1:
            dist.all_reduce(loss)
        losses.append(loss.item())
    return losses


def work(rank: int, folder: Path) -> None:
    """What each of the processes does."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    for case, options in CASES.items():
        for kind, wrap in WRAPPERS.items():
            model = pyllama.load(folder / case, "cpu", "float64")
            losses = train(model, wrap, rank, PROCESSES, **options)
            if kind == "fsdp2":
                assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
                model.save(folder / f"{case} {kind}")
            elif rank == 0:
                model.save(folder / f"{case} {kind}")
            if rank == 0:
                torch.save(losses, folder / f"{case} {kind}.losses")
    model = pyllama.load(folder / "deepseek_v3", "cpu", "float32")
    losses = train(model, mixed, rank, PROCESSES)
    model.save(folder / "mixed")
    with torch.no_grad():  # which leaves parameters whole, in bfloat16
        model(batches()[0][0])
    model.save(folder / "mixed again")
    try:
        model.save(folder / "mixed")  # where something is
    except (OSError, RuntimeError) as error:
        (folder / f"{rank}.error").write_text(f"{type(error).__name__}: {error}")
    if rank == 0:
        torch.save(losses, folder / "mixed.losses")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # all is on disk; at an ordinary end threads that torch has not joined yet may abort the process
