"""Mean gradients over the data-parallel dimension of a mesh, of each block while the next one computes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .watch import Watch


class Reducer:
    """The gradients of one optimizer's parameters, reduced together as soon as the last of them is there.

    ``optimizer.step()`` waits for the mean and then steps with it; it raises ``ParallelError`` if a rank is lost.
    Parameters that are sharded over the group have their mean from FSDP2.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup, watch: Watch):
        self.enabled = True  # off while gradients of a step are still being accumulated
        self._group, self._watch, self._work, self._flat = group, watch, None, None
        self._parameters = [p for g in optimizer.param_groups for p in g["params"] if not isinstance(p, DTensor)]
        self._ready: set[int] = set()
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._note)
        optimizer.register_step_pre_hook(lambda *_: self._finish())

    def _note(self, parameter: nn.Parameter) -> None:
        if self.enabled:
            self._ready.add(id(parameter))
            if len(self._ready) == len(self._parameters):
                self._start()

    def _start(self) -> None:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        self._flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._work = dist.all_reduce(self._flat, group=self._group, async_op=True)

    def _finish(self) -> None:
        if not self._parameters:
            return
        if self._work is None:  # a parameter without a gradient: the last one never came
            self._start()
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._watch.lost(dist.get_process_group_ranks(self._group), error) from error
        self._flat /= self._group.size()
        sizes = [p.numel() for p in self._parameters]
        for parameter, mean in zip(self._parameters, self._flat.split(sizes)):
            parameter.grad = mean.view_as(parameter)
        self._work, self._flat = None, None
        self._ready.clear()


def broadcast(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Give every rank of the group the numbers of its first one."""
    for tensor in tensors:
        dist.broadcast(tensor.detach(), dist.get_global_rank(group, 0), group)
