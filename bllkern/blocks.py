"""The boundary, and modules that end with one: what makes a network learn block by block.

A boundary stands after some module.  In training it scores the activation with a local objective, sends the gradient
back through everything computed since the previous boundary, and hands on the detached activation.  Autograd already
knows what lies between two boundaries, so branches, stems and arbitrary forward code work.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from . import objectives
from .execution import epilogue, noise, ownership, schedules, sizing, streams
from .execution.offload import Offload
from .execution.targets import current
from .objectives.terms import LocalLoss, total


class Boundary(nn.Module):
    """The end of a block: a local loss in training, nothing in eval mode or under ``no_grad``.

    Args:
        target_features: number of classes, or of dimensions of real targets.
        objective: a name or a :class:`bllkern.objectives.Objective`.
        schedule: ``"eager"``, ``"deferred"`` or ``"immediate"`` (see :mod:`bllkern.execution.schedules`); by default
            eager, or deferred for objectives that do not isolate.
        channel_dim: where the channels of the activation are; by default 1 from four dimensions up, else the last.

    ``forward(z, block, args, kwargs)`` takes the activation and how it was computed, ``block(*args, **kwargs)``; what
    is ``known`` already: terms of the loss (:meth:`linear`), or the pooled ``features``
    (:mod:`bllkern.execution.epilogue`); and, for denoising, what the block makes of a ``noisy`` input (:meth:`inputs`).
    Raises ``RuntimeError`` in training outside of :func:`bllkern.targets`, ``ValueError`` for targets that do not fit,
    ``FloatingPointError`` for a local loss that is not finite (on the CPU).
    """

    def __init__(
        self, target_features: int, objective="bll", schedule: str | None = None, channel_dim: int | None = None
    ):
        super().__init__()
        if not isinstance(target_features, int) or target_features < 1:
            raise ValueError(f"target_features must be a positive int, got {target_features!r}")
        self.options = objectives.get(objective)
        self.objective = self.options.build(target_features)
        self.schedule = schedules.check(schedule, self.options.isolate or not self.options.local)
        if self.objective is not None:
            self.objective.channel_dim = channel_dim
        self.name = ""  # where it stands in the network; set by convert, for messages
        self.block_parameters: list[nn.Parameter] | None = None  # known once an activation has come by
        self.optimizer_factory: Callable | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.feedback_factory: Callable | None = None  # where the feedback has an optimizer of its own
        self.feedback_optimizer: torch.optim.Optimizer | None = None
        self.loss: Tensor | None = None  # of the last step, detached
        self.step: object = None  # the targets of that step
        self.offload: Offload | None = None  # set by convert
        self.noise = 0.0  # standard deviation of what is handed on beside the activation; set by convert
        self.expects_noise = False  # to come with the input of the block; set by convert
        self.repeated = False  # passed several times in one step
        self.pending: list[Tensor] = []  # losses that wait for local_loss (deferred)
        self.pending_step: object = None
        self.handed_on: list[tuple[Tensor, int]] = []  # their activations, and the version of each (deferred)

    def extra_repr(self):
        return f"{self.options}, schedule={self.schedule!r}"

    @torch.compiler.disable
    def forward(
        self, z: Tensor, block: Callable | None = None, args=(), kwargs=None, known=None, noisy: Tensor | None = None
    ) -> Tensor:
        objective, options = self.objective, self.options
        if objective is None:
            return z
        if sizing.active():
            return sizing.visit(self, z)
        if not (self.training and torch.is_grad_enabled()):
            return self._hand_on(z)
        target = current()
        if not options.local:
            ownership.discover(self, z, target.owners)
            return objective(z, block, args, target)
        ready = streams.arrive(self, args, kwargs)
        with schedules.without_autocast(z.device.type):
            terms = objective(z, target, noisy, known) if known else objective(z, target, noisy)
            loss = total(terms, target.scale)
            schedules.check_finite(self, loss, terms)
            self._remember(loss.detach(), target)
            onwards = z.detach() if options.isolate else z
            if getattr(options, "bootstrapping", False):
                onwards = objective.posterior(onwards, target)  # of this step's messages, whatever steps below
            schedules.SCHEDULES[self.schedule](self, z, loss)
        return self._hand_on(onwards, ready)

    def inputs(self, args: tuple, kwargs: Mapping = MappingProxyType({})) -> tuple[tuple, tuple | None]:
        """Positional and keyword arguments of the module that ends here, and those with noise if it is to denoise.

        Noise that entered with the block has come with them; where no block comes before, it enters here.
        """
        if not getattr(self.options, "denoising", 0):
            return (args, kwargs), None
        return self._noisy_inputs((args, dict(kwargs)))

    @torch.compiler.disable
    def _noisy_inputs(self, given: tuple) -> tuple[tuple, tuple | None]:
        if not (self.training and torch.is_grad_enabled()) or sizing.active():
            return noise.half(given, "clean"), None
        if not self.expects_noise:
            given = tree_map(partial(noise.paired, std=self.options.noise), given)
        elif not noise.pairs(given):
            raise RuntimeError(
                f"denoising: no noise has come to {self.label}: call the converted network itself, with tensors, and "
                "let what lies between two boundaries be made of torch functions of the activation"
            )
        return noise.apart(given)

    def _hand_on(self, z: Tensor, ready: object = None) -> Tensor:
        """The block is done: its weights may go, and the next one begins."""
        if self.offload is not None:
            self.offload.leave(self)
        streams.leave(z, ready)
        if self.offload is not None:
            self.offload.enter()
        return noise.paired(z, self.noise) if self.noise and noise.wanted() else z

    @torch.compiler.disable
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """``F.linear`` in training, and the terms of the objective that come with it from the same pass."""
        if sizing.active() or not torch.is_grad_enabled():
            return F.linear(x, weight, bias), {}
        return self.objective.linear(x, weight, bias, current())

    def _remember(self, loss: Tensor, step: object) -> None:
        """Keep the loss of this step; a boundary that is passed several times in one step adds them up."""
        self.loss = loss if self.step is not step else self.loss + loss
        self.step = step

    def own_parameters(self) -> list[nn.Parameter]:
        """What this block's local loss moves: the block's parameters and those of its objective."""
        return self.block_parameters + [p for p in self.parameters() if p.requires_grad]

    def make_optimizers(self, taken: Collection[int] = ()) -> None:
        """Make the optimizers that this boundary was given factories for, unless they are there.

        ``taken`` has the identities of parameters that the optimizers of other blocks have.
        """
        if self.optimizer is not None and (self.feedback_factory is None or self.feedback_optimizer is not None):
            return
        apart = self.feedback_parameters() if self.feedback_factory is not None else []
        taken = {*taken, *map(id, apart)}
        rest = [p for p in self.own_parameters() if id(p) not in taken]
        if self.optimizer is None and rest:
            self.optimizer = self.optimizer_factory(rest)
        if self.feedback_optimizer is None and apart:
            self.feedback_optimizer = self.feedback_factory(apart)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The block's own optimizer and that of its feedback, as far as they are there."""
        return [o for o in (self.optimizer, self.feedback_optimizer) if o is not None]

    def feedback_parameters(self) -> list[nn.Parameter]:
        """What the feedback of this boundary learns."""
        feedback = getattr(self.objective, "feedback", None)
        return [] if feedback is None else [p for p in feedback.parameters() if p.requires_grad]

    @property
    def label(self) -> str:
        return f"block {self.name!r}" if self.name else "a block"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """A checkpoint of the plain network has nothing for ``local``: what is there already stays."""
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self):
        return {**self.__dict__, "pending": [], "handed_on": [], "step": None, "pending_step": None}


def first_tensor(output) -> Tensor:
    """The activation in what a module returned: the output itself, or the first entry of a tuple, dict or dataclass."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return next(iter(output.values()))
    if dataclasses.is_dataclass(output):
        return getattr(output, dataclasses.fields(output)[0].name)
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_first(output, z: Tensor):
    """``output`` with ``z`` in the place of :func:`first_tensor`; what the module returned stays as it is."""
    if isinstance(output, Tensor):
        return z
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        changed[next(iter(output))] = z
        return changed
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{dataclasses.fields(output)[0].name: z})
    if isinstance(output, (tuple, list)):
        entries = (z, *output[1:])
        return type(output)(*entries) if hasattr(output, "_fields") else type(output)(entries)
    return z


class BlockLocal(nn.Module):
    """Any module as one block: ``module`` followed by a boundary, ``local``.

    Where the module returns a tuple, list, dict or dataclass, its first entry is the activation.  Attributes, items and
    length are those of ``module``; a checkpoint of the plain module loads.  Arguments are those of :class:`Boundary`;
    ``example``, an input of the module, sizes heads and feedback now instead of at the first call.
    """

    def __init__(
        self,
        module: nn.Module,
        target_features: int,
        objective="bll",
        schedule: str | None = None,
        example: Tensor | None = None,
        channel_dim: int | None = None,
    ):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self.module = module
        self.local = Boundary(target_features, objective, schedule, channel_dim)
        if example is not None:
            sizing.size(self, example)

    def forward(self, *args, **kwargs):
        (args, kwargs), noisy = self.local.inputs(args, kwargs)
        output, known = self._run(args, kwargs)
        noisy = None if noisy is None else noise.half(first_tensor(self.module(*noisy[0], **noisy[1])), "noisy")
        z = self.local(first_tensor(output), self.module, args, kwargs, known, noisy)
        return _with_first(output, z)

    def _run(self, args, kwargs):
        """What the module returns, and what the objective reads of it where the end of the module yields that too."""
        side = self.local.objective.side if isinstance(self.local.objective, LocalLoss) else None
        apart = side is None or not self.local.options.isolate or kwargs or len(args) != 1
        if torch.compiler.is_compiling() or apart or not (self.training and torch.is_grad_enabled()) or sizing.active():
            return self.module(*args, **kwargs), None
        z, pooled = epilogue.run(self.module, *args, side)
        return z, None if pooled is None else {"pooled": pooled}

    def plain(self) -> nn.Module:
        """The module without its boundary."""
        return self.module

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Take the keys of the plain module, which lack ``module.``, too."""
        keys = self.module.state_dict()
        if keys and not any(prefix + "module." + key in state_dict for key in keys):
            for key in [key for key in state_dict if key.startswith(prefix)]:
                state_dict[prefix + "module." + key[len(prefix) :]] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def __getitem__(self, index):
        return self.module[index]

    def __len__(self):
        return len(self.module)

    def __iter__(self):
        return iter(self.module)

    def __bool__(self):
        return True


def _local_layer(layer: type[nn.Module], channel_dim: int) -> type[nn.Module]:
    """``layer`` followed by a boundary, with the layer's own arguments, parameters and checkpoint keys."""

    class BlockLocalLayer(layer):
        __doc__ = f"""``torch.nn.{layer.__name__}`` followed by a boundary, ``local``.

        Positional and keyword arguments are those of ``torch.nn.{layer.__name__}``; ``target_features``, ``objective``,
        ``schedule`` and ``example`` (one input of the layer) are those of :class:`BlockLocal`.  ``weight`` and ``bias``
        keep their keys, so checkpoints of the plain layer load.
        """

        def __init__(self, *args, target_features: int, objective="bll", schedule=None, example=None, **kwargs):
            super().__init__(*args, **kwargs)
            self.local = Boundary(target_features, objective, schedule, channel_dim)
            if example is not None:
                sizing.size(self, example)

        def forward(self, x: Tensor) -> Tensor:
            (args, _), noisy = self.local.inputs((x,))
            z = super().forward(*args)
            return self.local(z, super().forward, args, noisy=None if noisy is None else super().forward(*noisy[0]))

        def plain(self) -> nn.Module:
            """The layer without its boundary, sharing the parameters."""
            plain = layer.__new__(layer)
            plain.__dict__.update(self.__dict__)
            plain._modules = {}
            return plain

    name = f"BlockLocal{layer.__name__}"
    BlockLocalLayer.__name__ = BlockLocalLayer.__qualname__ = name
    return BlockLocalLayer


class BlockLocalLinear(_local_layer(nn.Linear, -1)):
    """``torch.nn.Linear`` followed by a boundary, ``local``; keyword arguments as in :class:`BlockLocal`.

    Where the objective has an agreement term, one pass over the activation, right after the matrix product, yields loss
    and gradient (:func:`bllkern.functional.linear_agreement`).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and "agreement" in getattr(self.local.objective, "terms", ())):
            return super().forward(x)
        ((x,), _), noisy = self.local.inputs((x,))
        z, known = self.local.linear(x, self.weight, self.bias)
        noisy = None if noisy is None else nn.Linear.forward(self, *noisy[0])
        return self.local(z, nn.Linear.forward, (self, x), known=known, noisy=noisy)


BlockLocalConv1d = _local_layer(nn.Conv1d, 1)
BlockLocalConv2d = _local_layer(nn.Conv2d, 1)
BlockLocalConv3d = _local_layer(nn.Conv3d, 1)
BlockLocalConv = BlockLocalConv2d
