"""A whole training step as one CUDA graph, the streams of its blocks as parallel branches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

WARM_UP = 3  # steps before one is recorded: what libraries, optimizers and lazy modules set up must be there

_recording: ContextVar[bool] = ContextVar("bllkern_recording", default=False)


def recording() -> bool:
    """Whether the step that runs is to be replayed: then what a launch costs the host does not count."""
    return _recording.get()


def capture(step: Callable, *inputs: Tensor) -> CapturedStep:
    """Record ``step(*inputs)`` as one CUDA graph and replay it from then on.

    ``step`` is a whole training step: forward pass, local losses, backward pass, optimizer steps, ``zero_grad``.  What
    is returned is called as ``step`` is, with tensors of the same shape, dtype and device as ``inputs``.  Every call is
    one training step: the first three run as they are, the fourth is recorded, and it and all that follow are replayed.

    A recorded step repeats what it did: no branch in Python is taken again, learning rates that are floats stay
    (``lr=torch.tensor(...)`` moves), and what it returns is in the same memory each time, so ``clone()`` what is to
    be kept.  It must not read a value on the host (``.item()``, ``print(loss)``).  On a CPU every call runs as it is.

    Raises: ``TypeError`` for a step that cannot be called or inputs that are no tensors, ``ValueError`` for inputs on
    several devices; when called, ``ValueError`` for an input that differs from those here, and ``RuntimeError`` for an
    optimizer that cannot be recorded or a step that waits for the device.
    """
    if not callable(step):
        raise TypeError(f"step must be callable, got {type(step).__name__}")
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs[{i}] must be a tensor, got {type(x).__name__}")
    devices = {x.device for x in inputs}
    if len(devices) != 1:
        raise ValueError(f"inputs must be tensors on one device, got {sorted(map(str, devices)) or 'no tensor'}")
    device = devices.pop()
    return RecordedStep(step, inputs) if device.type == "cuda" else CapturedStep(step, inputs)


@contextmanager
def undone_if_it_fails(device: torch.device):
    """Around the capture of a CUDA graph: torch leaves current stream and random numbers as one that fails has them."""
    caller, generator = torch.cuda.current_stream(device), torch.cuda.default_generators[device.index]
    before = generator.clone_state()
    try:
        yield
    except RuntimeError:
        torch.cuda.set_stream(caller)
        generator.graphsafe_set_state(before)
        raise


class CapturedStep:
    """A training step with inputs of fixed shape, dtype and device; this one runs as it is at every call."""

    def __init__(self, step: Callable, inputs: tuple[Tensor, ...]):
        self.step = step
        self.expected = [(x.dtype, x.shape, x.device) for x in inputs]

    def __call__(self, *inputs: Tensor):
        self._check(inputs)
        return self.step(*inputs)

    def _check(self, inputs: tuple) -> None:
        if len(inputs) != len(self.expected):
            raise ValueError(f"the step was captured with {len(self.expected)} inputs, got {len(inputs)}")
        for i, (x, (dtype, shape, device)) in enumerate(zip(inputs, self.expected, strict=True)):
            if not isinstance(x, Tensor) or (x.dtype, x.shape, x.device) != (dtype, shape, device):
                got = f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"inputs[{i}] must be {dtype} {list(shape)} on {device}, as captured, got {got}")


class RecordedStep(CapturedStep):
    """A step on a GPU: three calls to warm up, then a CUDA graph."""

    def __init__(self, step: Callable, inputs: tuple[Tensor, ...]):
        super().__init__(step, inputs)
        self.inputs = [x.detach().clone() for x in inputs]
        self.stream = torch.cuda.Stream(inputs[0].device)  # libraries set up their handles for each stream
        self.warm_up_left = WARM_UP
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output = None

    def __call__(self, *inputs: Tensor):
        self._check(inputs)
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x, non_blocking=True)
        if self.graph is None:
            token = _recording.set(True)
            try:
                if self.warm_up_left:
                    return self._warm_up()
                self._record()
            finally:
                _recording.reset(token)
        self.graph.replay()
        return self.output

    def _warm_up(self):
        caller = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(caller)
        hook = register_optimizer_step_pre_hook(_check_capturable)
        try:
            with torch.cuda.stream(self.stream):
                output = self.step(*self.inputs)
        finally:
            hook.remove()
            caller.wait_stream(self.stream)
        self.warm_up_left -= 1
        return output

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with undone_if_it_fails(self.stream.device), torch.cuda.graph(graph, stream=self.stream):
                self.output = self.step(*self.inputs)
        except RuntimeError as error:
            raise RuntimeError(
                "the step cannot be recorded as a CUDA graph. It must not read a value on the host (.item(), print, "
                "`if loss > 1`), nor clip with error_if_nonfinite=True; what it allocates once must be there after "
                f"{WARM_UP} steps. From CUDA: {error}"
            ) from error
        self.graph = graph


def _check_capturable(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Before a step: one that counts its steps on the host would repeat the first one for ever."""
    for group in optimizer.param_groups:
        if "capturable" in group and not (group["capturable"] or group.get("fused")):
            name = type(optimizer).__name__
            raise RuntimeError(f"{name} counts its steps on the host: write {name}(..., capturable=True) to capture it")
