"""One set-up for all benchmarks: the same inputs for every provider, what a step is, and what is reported about it.

A benchmark names its plain-torch formula and the library's function; ``provider`` makes of them eager torch,
``torch.compile`` and ours.  ``Bench`` (the fixture ``bench``) times one of them, and puts peak memory, bytes moved and
the fraction of the copy bandwidth measured in the same run into ``extra_info``.  Of whole networks, ``in_turn`` times a
step each.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import pytest
import torch
from torch import Tensor

from bllkern.cli import measure
from bllkern.execution.capture import undone_if_it_fails

PROVIDERS = ("eager", "compile", "bllkern")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DIRECTIONS = ("forward", "forward+backward")
DTYPES = ("float32", "bfloat16")
SECONDS = {"cpu": 0.4, "cuda": 0.05}  # to spend on one benchmark, roughly
COLD_BYTES = 256 << 20  # inputs rotate on a GPU until they are more than its caches hold


def compared(*more: str) -> Callable:
    """Parametrize a benchmark by device, direction, dtype and provider, with ``more`` providers than the usual ones.

    Providers vary fastest, so that those of one case run one after the other.
    """

    def parametrized(test: Callable) -> Callable:
        ranges = {"device": DEVICES, "direction": DIRECTIONS, "dtype": DTYPES, "which": (*PROVIDERS, *more)}
        for name, values in ranges.items():
            test = pytest.mark.parametrize(name, values)(test)
        return test

    return parametrized


def skip_reason(device: str, direction: str, dtype: str, which: str) -> str | None:
    """Why a combination of :func:`compared` is not worth its time, if it is not."""
    if which == "compile" and (direction == "forward" or device == "cpu" and dtype != "float32"):
        return "compiling takes longer than it tells"
    return None


def provider(name: str, plain: Callable, ours: Callable) -> Callable:
    """The function that ``name`` stands for; ``plain`` is the formula in plain torch."""
    if name == "compile":
        torch._dynamo.reset()
        return torch.compile(plain)
    return {"eager": plain, "bllkern": ours}[name]


def step(function: Callable, inputs: tuple[Tensor, ...], backward: bool) -> Callable[[], None]:
    """One measured step: the forward pass, or forward and backward passes with gradients made anew."""
    if not backward:
        return torch.no_grad()(functools.partial(function, *inputs))
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]

    def forward_backward():
        for x in leaves:
            x.grad = None
        function(*leaves).backward()

    return forward_backward


def peak_memory(run: Callable[[], None], device: str) -> int:
    """Bytes that torch's allocator holds at most during ``run``, beyond those it holds before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    return max(measure.held(profile))


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of a copy that no cache holds."""
    source = torch.randn(1 << (25 if device == "cpu" else 28), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median(seconds(lambda: target.copy_(source), device, rounds=10))


def seconds(run: Callable[[], None], device: str, rounds: int) -> list[float]:
    """What each of so many runs takes, after one that does not count."""
    now, results = clock(device), []
    for _ in range(rounds + 1):
        start = now()
        run()
        results.append(now() - start)
    return results[1:]


def in_turn(benchmark, steps: dict[str, Callable], peaks: dict[str, int], base: str, device: str, rounds: int) -> None:
    """Time rounds of one step of each variant, so that what else the machine does weighs on all alike.

    ``extra_info["variants"]`` gets the median seconds and the ``peaks``, and both as ratios to the variant ``base``: of
    time the median over the rounds, in each of which the machine is as fast for one as for the other.
    """
    times, now = {variant: [] for variant in steps}, clock(device)

    def round_of_all():
        for variant, step in steps.items():
            start = now()
            step()
            times[variant].append(now() - start)

    benchmark.pedantic(round_of_all, rounds=rounds, iterations=1)
    benchmark.extra_info["variants"] = {
        variant: {
            "step_seconds": median(times[variant]),
            "peak_memory_bytes": peaks[variant],
            "time_ratio": median(t / b for t, b in zip(times[variant], times[base], strict=True)),
            "memory_ratio": peaks[variant] / peaks[base],
        }
        for variant in steps
    }


def clock(device: str) -> Callable[[], float]:
    """Seconds, on a GPU by its own clock."""
    return device_clock() if device == "cuda" else time.perf_counter


def device_clock() -> Callable[[], float]:
    """Seconds on the GPU's clock, when everything launched so far is done."""
    start = torch.cuda.Event(enable_timing=True)
    start.record()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return start.elapsed_time(event) / 1e3

    return now


class Rotation:
    """On a GPU: the step on one set of inputs after another, each a replayed CUDA graph, so that caches are cold.

    A step that waits for the device, as those of some packages do, runs as it is.
    """

    def __init__(self, steps: list[Callable[[], None]]):
        self.steps, self.next = [_captured(run) for run in steps], 0

    def __call__(self):
        self.steps[self.next]()
        self.next = (self.next + 1) % len(self.steps)


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    stream, caller = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    caller.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with undone_if_it_fails(stream.device), torch.cuda.graph(graph):
            run()
    except RuntimeError:
        return run
    return graph.replay


@dataclass
class Bench:
    """One combination of :func:`compared`, to be called with what is measured."""

    benchmark: Callable
    bandwidth: Callable[[str], float]
    device: str
    direction: str
    dtype: torch.dtype

    @property
    def backward(self) -> bool:
        return self.direction == "forward+backward"

    def randn(self, *shape: int) -> Tensor:
        """Normal numbers, drawn in float32."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def labels(self, classes: int, rows: int) -> Tensor:
        return torch.randint(classes, (rows,), device=self.device)

    def __call__(
        self, case: str, function: Callable, make_inputs: Callable[[], tuple[Tensor, ...]], bytes_moved: int
    ) -> None:
        """Time ``function`` on inputs that ``make_inputs`` draws; ``bytes_moved`` is the least a step can move."""
        device, dtype = self.device, str(self.dtype).removeprefix("torch.")
        self.benchmark.group = f"{case} {dtype} {self.direction} {device}"
        inputs = make_inputs()
        run = step(function, inputs, self.backward)
        run()
        if self.benchmark.disabled:  # what compilers keep on the disk is there now
            return
        peak = peak_memory(step(function, inputs, self.backward), device)  # a fresh step has no gradients to free
        iterations = 1
        if device == "cuda":
            iterations = max(2, COLD_BYTES // sum(x.nbytes for x in inputs) + 1) if bytes_moved >= 1 << 20 else 2
            sets = [inputs] + [make_inputs() for _ in range(iterations - 1)]
            run = Rotation([step(function, each, self.backward) for each in sets])
            self.benchmark._timer = device_clock()
        once = seconds(run, device, rounds=1)[0]
        if device == "cpu":
            iterations = max(1, min(1000, int(1e-3 / once)))
        rounds = max(5, min(200, int(SECONDS[device] / (once * iterations))))
        self.benchmark.pedantic(run, rounds=rounds, iterations=iterations)
        self._report(device, peak, bytes_moved)

    def bound(self, name: str, seconds: float) -> None:
        """Report the part of what was just measured that ``name`` alone takes."""
        if self.benchmark.disabled:
            return
        fraction = seconds / self.benchmark.stats.stats.median
        self.benchmark.extra_info.update(bound=name, fraction_of_bound=fraction)

    def _report(self, device: str, peak: int, bytes_moved: int) -> None:
        bandwidth, seconds = self.bandwidth(device), self.benchmark.stats.stats.median
        self.benchmark.extra_info.update(
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            triton=getattr(sys.modules.get("triton"), "__version__", None),
            cuda=torch.version.cuda,
            peak_memory_bytes=peak,
            bytes_moved=bytes_moved,
            copy_bytes_per_second=bandwidth,
            fraction_of_copy_bandwidth=bytes_moved / seconds / bandwidth,
        )
