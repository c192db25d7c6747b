"""Checkpoints through torch.distributed.checkpoint: by name, so that any number of ranks reads what another wrote.

Each rank writes the parameters, buffers and optimizer states of its own blocks.  A checkpoint is a folder of its own,
``step-00000042``, and counts once its metadata is there, which torch writes last: a job that is killed while it writes
leaves the checkpoint before as the newest.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from .block_parallel import BlockParallel
from .watch import ParallelError

_NAME = re.compile(r"step-(\d{8,})")


def save(parallel: BlockParallel, folder: str | Path, **extra: Tensor) -> Path:
    """Write a checkpoint of the step reached into ``folder``; to be called by all ranks.  Returns its path.

    ``extra``: tensors of the caller's, the same on all ranks.  Raises ``ParallelError`` if some rank cannot write.
    """
    path = Path(folder) / f"step-{parallel.steps:08d}"
    state = {f"net.{name}": tensor for name, tensor in parallel.part.tensors().items()}
    state |= _optimizer_tensors(parallel) | _groups(parallel)
    state |= {f"extra.{name}": tensor for name, tensor in extra.items()}
    state[_random()] = torch.get_rng_state()
    with _together(parallel) as group:
        dcp.save(state, checkpoint_id=path, process_group=group)
    return path


def newest(folder: str | Path) -> Path | None:
    """The last complete checkpoint in ``folder``, or ``None``."""
    found = [
        path for path in Path(folder).glob("step-*") if _NAME.fullmatch(path.name) and (path / ".metadata").exists()
    ]
    return max(found, key=_steps, default=None)


def load(parallel: BlockParallel, folder: str | Path, **extra: Tensor) -> int:
    """Continue from the newest checkpoint in ``folder``, whatever number of ranks wrote it; to be called by all ranks.

    Returns the number of steps done, 0 where there is no checkpoint.  ``extra`` is overwritten with what was saved.
    Random numbers continue if the number of ranks is the same.  Raises ``ValueError`` for a checkpoint of another
    network or of other optimizers, ``ParallelError`` for one that some rank cannot read.
    """
    chosen = [newest(folder)]
    dist.broadcast_object_list(chosen, src=0, group=parallel.group)  # rank 0 writes the metadata, so it knows
    if chosen[0] is None:
        return 0
    path = chosen[0]
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    own = {f"net.{name}": tensor for name, tensor in parallel.part.tensors().items()}
    own |= {f"extra.{name}": tensor for name, tensor in extra.items()}
    groups = _groups(parallel)
    missing = sorted((own.keys() | groups.keys()) - stored.keys())
    wrong = [name for name, tensor in own.items() if name in stored and stored[name].size != tensor.shape]
    if missing or wrong:
        raise ValueError(
            f"{path} is of another network or of other optimizers: it lacks {missing}, has other shapes for {wrong}"
        )
    state = own | groups | _optimizer_room(parallel, stored)
    if _random() in stored:
        state[_random()] = torch.get_rng_state()
    with _together(parallel) as group:
        dcp.load(state, checkpoint_id=path, process_group=group)
    _restore(parallel, state)
    parallel.steps = _steps(path)
    return parallel.steps


@contextmanager
def _together(parallel: BlockParallel):
    """All ranks as a process group; what fails in it is the fault of a rank that is lost, or that says so itself."""
    try:
        yield parallel.group
    except CheckpointException as error:  # which is no Exception
        rank, (cause, _) = next(iter(error.failures.items()))
        failed = ParallelError(f"{parallel.watch.labels[rank]} could not read or write the checkpoint: {cause}")
        raise parallel.watch.report(failed) from error
    except RuntimeError as error:
        raise parallel.watch.lost(dist.get_process_group_ranks(parallel.group), error) from error


def _steps(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _random() -> str:
    return f"random.{dist.get_rank()}of{dist.get_world_size()}"


def _names(parallel: BlockParallel) -> dict[str, Tensor]:
    own = set(parallel.part.own)
    return {name: parameter for name, parameter in parallel.part.net.named_parameters() if name in own}


def _optimizer_tensors(parallel: BlockParallel) -> dict[str, Tensor]:
    """The optimizers' states by parameter and entry."""
    states = {}
    for optimizer in parallel.optimizers:
        states.update(optimizer.state)
    return {
        f"optimizer.{name}/{entry}": value
        for name, parameter in _names(parallel).items()
        for entry, value in states.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _optimizer_names(parallel: BlockParallel, stored: dict) -> list[str]:
    prefixes = {f"optimizer.{name}" for name in _names(parallel)}
    return [name for name in stored if name.rpartition("/")[0] in prefixes]


def _optimizer_room(parallel: BlockParallel, stored: dict) -> dict[str, Tensor]:
    """Tensors for the optimizer states of this rank; those like a sharded parameter are divided as it is."""
    parameters, room = _names(parallel), {}
    for key in _optimizer_names(parallel, stored):
        parameter = parameters[key.removeprefix("optimizer.").rpartition("/")[0]]
        size, dtype = stored[key].size, stored[key].properties.dtype
        divided = isinstance(parameter, DTensor) and parameter.shape == size
        room[key] = torch.empty_like(parameter.detach(), dtype=dtype) if divided else torch.empty(size, dtype=dtype)
    return room


def _groups(parallel: BlockParallel) -> dict[str, str]:
    """The options of each block's optimizer, learning rates among them, as JSON: torch would take a list apart."""
    return {
        f"options.{block}": json.dumps([{k: v for k, v in group.items() if k != "params"} for group in o.param_groups])
        for block, o in parallel.block_optimizers().items()
    }


def _restore(parallel: BlockParallel, state: dict) -> None:
    names = _names(parallel)
    owners = {p: o for o in parallel.optimizers for group in o.param_groups for p in group["params"]}
    for key in _optimizer_names(parallel, state):
        name, _, entry = key.removeprefix("optimizer.").rpartition("/")
        owners[names[name]].state[names[name]][entry] = state[key]
    for block, optimizer in parallel.block_optimizers().items():
        for group, options in zip(optimizer.param_groups, json.loads(state[f"options.{block}"]), strict=True):
            group.update(options)
    if _random() in state:
        torch.set_rng_state(state[_random()])
