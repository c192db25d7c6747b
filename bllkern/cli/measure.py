"""Time and memory of training steps."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
from contextlib import contextmanager

import torch

WARM_UP = 5  # steps that allocate, choose kernels and fill caches
_MARK = "bllkern: a measured step"

# 99 is above every level: torch 2.13's profiler announces its start and stop on stderr otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


class StepTimer:
    """Durations of steps in seconds; on a CUDA device by events, so that no step waits for the device."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple] = []

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def step(self):
        start = self._now()
        yield
        self.marks.append((start, self._now()))

    def median(self) -> float | None:
        """Median over the steps after the first ``WARM_UP``, or over all where there are fewer; of none, ``None``."""
        marks = self.marks[WARM_UP:] or self.marks
        if not marks:
            return None
        if self.cuda:
            torch.cuda.synchronize()
            return statistics.median(start.elapsed_time(stop) / 1e3 for start, stop in marks)
        return statistics.median(stop - start for start, stop in marks)


class PeakMemory:
    """Peak bytes that torch's allocator holds during a step, beyond what it held when the step began.

    So parameters, optimizer states and the data set do not count; activations, gradients and temporaries do.  The last
    of the first ``steps`` steps is measured: optimizer states are made in the first one.
    """

    def __init__(self, device: torch.device, steps: int):
        self.cuda, self.left = device.type == "cuda", steps
        self.bytes: int | None = None
        self._profile: torch.autograd.profiler.profile | None = None

    def start(self) -> None:
        """Watch from here on: the CPU profiler only knows the size of what is allocated while it runs."""
        if self._profile is None and not self.cuda:
            gc.collect()  # or an older network, still waiting for the collector, is released during the step
            self._profile = torch.autograd.profiler.profile(profile_memory=True)
            self._profile.__enter__()

    @contextmanager
    def step(self):
        """To be entered for every step; costs nothing once one is measured."""
        if self.left == 0:
            yield
            return
        self.left -= 1
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with torch.autograd.profiler.record_function(_MARK):
            yield
        if self.left == 0 and self.cuda:
            self.bytes = torch.cuda.max_memory_allocated() - before
        elif self.left == 0:
            self._profile.__exit__(None, None, None)
            self.bytes = self._replay()

    def _replay(self) -> int:
        marks = (event for event in self._profile.kineto_results.events() if event.name() == _MARK)
        return max(held(self._profile, since=max(mark.start_ns() for mark in marks)))


def held(profile: torch.autograd.profiler.profile, since: int = 0) -> list[int]:
    """Bytes that torch's allocator holds after each allocation and release, in the order in which they happened.

    Args: profile: one that has ended, with ``profile_memory=True``.  since: nanoseconds; what happened before, of which
    the profiler may not know all, does not count.
    Returns: at least one number, the first of which is 0.
    """
    memory = [e for e in profile.kineto_results.events() if e.name() == "[memory]" and e.start_ns() >= since]
    memory.sort(key=lambda event: event.start_ns())
    return list(itertools.accumulate((event.nbytes() for event in memory), initial=0))


def human_bytes(number: int) -> str:
    """Such as ``3.1 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.{0 if unit == 'B' else 1}f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"


def human_time(seconds: float) -> str:
    """Such as ``1.2 ms`` or ``3.4 s``."""
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"
