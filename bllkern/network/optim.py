"""An optimizer for each block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain

import torch
from torch import nn

from .losses import boundaries

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _made(factory: Factory, label: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """``factory(parameters)``; ``ValueError`` for an optimizer that misses some of them."""
    optimizer = factory(parameters)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missed = [list(p.shape) for p in parameters if id(p) not in held]
    if missed:
        raise ValueError(
            f"factory must return an optimizer of all parameters that it gets; that of {label} misses "
            f"{len(missed)} of {len(parameters)}, the first of shape {missed[0]}"
        )
    return optimizer


class BlockOptimizers:
    """One optimizer for each block, and one for the output block, which follows the last boundary.

    With ``feedback``, the feedback of each boundary has one of its own instead of sharing the block's.

    Which parameters a block has is known once data has passed its boundary: at once where ``example=`` was given, else
    at the first step.  Iterating yields the optimizers that exist, block by block, the output's last (for learning-rate
    schedulers, say).
    """

    def __init__(self, net: nn.Module, factory: Factory, feedback: Factory | None = None):
        self._net, self._factory = net, factory
        self._boundaries = [b for b in boundaries(net).values() if b.objective is not None]
        self._output: torch.optim.Optimizer | None = None
        self._complete = False
        self._offload = next((b.offload for b in self._boundaries if b.offload is not None), None)
        if self._offload is not None and feedback is not None:
            raise ValueError("feedback must be None for a network with offload: one optimizer travels with each block")
        for boundary in self._boundaries:
            boundary.optimizer, boundary.optimizer_factory = None, partial(_made, factory, boundary.label)
            boundary.feedback_optimizer = None
            boundary.feedback_factory = None if feedback is None else partial(_made, feedback, boundary.label)
        self._build()

    def _build(self) -> bool:
        """Make the optimizers that can be made; whether all of them exist."""
        if self._complete:
            return True
        taken: set[int] = set()
        for boundary in self._boundaries:
            if boundary.block_parameters is None:
                return False
            boundary.make_optimizers(taken)
            taken.update(map(id, boundary.own_parameters()))
        rest = [p for p in self._net.parameters() if p.requires_grad and id(p) not in taken]
        if self._output is None and rest:
            self._output = _made(self._factory, "the output block", rest)
        self._complete = True
        if self._offload is not None:
            self._offload.output_optimizer = self._output
        return True

    def __iter__(self) -> Iterable[torch.optim.Optimizer]:
        found = [optimizer for boundary in self._boundaries for optimizer in boundary.optimizers()]
        return iter(found if self._output is None else [*found, self._output])

    def __len__(self):
        return len(list(iter(self)))

    def _all(self) -> list[torch.optim.Optimizer]:
        if not self._build():
            raise RuntimeError("the blocks are not known yet: pass example= to convert, or run a training step first")
        return list(self)

    def _on_host(self) -> list[torch.optim.Optimizer]:
        """All optimizers; what offload takes back to the CPU has arrived there."""
        if self._offload is not None:
            self._offload.synchronize()
        return self._all()

    def step(self) -> None:
        """Step the output block and every block that does not step itself (schedule ``"immediate"``).

        With ``offload`` the output block goes back to the CPU then, without its gradients.
        """
        self._all()
        for boundary in self._boundaries:
            for optimizer in boundary.optimizers() if boundary.schedule != "immediate" else ():
                optimizer.step()
        if self._output is not None:
            self._output.step()
        if self._offload is not None:
            self._offload.finish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all blocks."""
        held = (group["params"] for optimizer in self for group in optimizer.param_groups)
        for parameter in chain(*held) if self._complete else self._net.parameters():
            if parameter.grad is not None and set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self) -> dict:
        """The state of every optimizer, in the order of iteration."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self._on_host()]}

    def load_state_dict(self, state: dict) -> None:
        """Restore :meth:`state_dict`.  Raises ``ValueError`` where the number of optimizers differs."""
        optimizers, states = self._on_host(), state["optimizers"]
        if len(optimizers) != len(states):
            raise ValueError(f"state must hold {len(optimizers)} optimizers, got {len(states)}")
        for optimizer, one in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(one)


def optimizers(net: nn.Module, factory: Factory, feedback: Factory | None = None) -> BlockOptimizers:
    """An optimizer for each block of ``net``, made by ``factory(parameters)``; see :class:`BlockOptimizers`.

    ``feedback(parameters)`` makes one for the feedback of each boundary; without it the block's takes care of that too.

    With schedule ``"immediate"`` each block's optimizer steps inside the forward pass, and ``step()`` of what is
    returned steps the output block; with the others it steps all blocks.

    Raises ``ValueError`` if ``net`` has no boundary, or for an optimizer that misses parameters of its block.
    """
    if not boundaries(net):
        raise ValueError("net has no block-local boundary: use bllkern.convert or block-local layers first")
    return BlockOptimizers(net, factory, feedback)
