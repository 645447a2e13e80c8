"""The processes that train one run together: who each is, and what they add up.

Every process goes through the same steps with a share of each step's rows, and has the same weights after it. What a run
learns does not depend on how many there are (but for the rounding of sums). One process needs nothing of this.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from tunesmith.errors import RunError
from tunesmith.preflight import launched

Item = TypeVar("Item")
PATIENCE = timedelta(hours=12)  # for the first process to read a large data set; who is lost is noticed otherwise


class World(msgspec.Struct, frozen=True):
    """A process's place among `size` of them. Alone, every method gives back what it got."""

    rank: int = 0
    size: int = 1

    def share(self, items: Sequence[Item], rank: int | None = None) -> list[Item]:
        """Every size-th of the items, from this process's place (or that of `rank`) on."""
        return list(items[self.rank if rank is None else rank :: self.size])

    def sum(self, *numbers: float) -> list[float]:
        """Each number added up over all processes, in float64."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=_where())
        dist.all_reduce(total)
        return [float(x) for x in total.tolist()]

    def first(self, value: Item) -> Item:
        """What the first process says, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=_where())
        return box[0]

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of each process, of the same shape in all, on the CPU."""
        if self.size == 1:
            return [tensor]
        here = tensor.to(_where())
        parts = [torch.empty_like(here) for _ in range(self.size)]
        dist.all_gather(parts, here)
        return [part.cpu() for part in parts]


ALONE = World()


def _where() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def join() -> World:
    """Meet the other processes, where there are any. Raises RunError when they do not come."""
    if not launched():
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"the processes do not find each other: {str(error).splitlines()[0]}",
                where=f"MASTER_ADDR {os.environ.get('MASTER_ADDR')}",
                fix="can each reach that address and port?",
            ) from None
    return World(dist.get_rank(), dist.get_world_size())


def spread(module: torch.nn.Module, layers: Sequence[torch.nn.Module]) -> None:
    """Give each process a share of every weight (FSDP2): a layer is whole only while it is computed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(_where().type, (dist.get_world_size(),))
    for part in (*layers, module):
        fully_shard(part, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):  # gradients are added up: the loss is divided by all processes' tokens
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A weight that may be spread over the processes, in one piece; to be called in all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, spread as another is; itself where that is not."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def launch(command: Sequence[str], count: int) -> list[subprocess.Popen[bytes]]:
    """Make this process the first of `count` on this machine, and start the others; they end when it does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    if sys.platform == "linux":
        here["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo asks for the machine's own name, which may not resolve offline
    ranks = [{**here, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    os.environ.update(ranks[0])
    return [
        subprocess.Popen([*command], stdin=subprocess.PIPE, env={**os.environ, **rank}, start_new_session=True)
        for rank in ranks[1:]
    ]
