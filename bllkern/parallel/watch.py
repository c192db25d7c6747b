"""Who is alive: heartbeats of every rank through the store of the job, and the error that names the one that is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch.distributed as dist

SLICE = 0.05  # seconds between two looks at what may have failed


def agreed(value):
    """What rank 0 has."""
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


class ParallelError(RuntimeError):
    """A rank died, stalled or sent what it should not; the message names the rank and its blocks."""


class Watch:
    """Beats for this rank, waits for others with a limit, and says whose fault it is when that is exceeded.

    Args: labels: what each rank of the job is, by rank.  timeout: seconds that a rank may keep the others waiting.
    name: of the job in the store, which may hold what an earlier attempt has left.
    """

    def __init__(self, labels: dict[int, str], timeout: float, name: str):
        self.labels, self.timeout = labels, timeout
        self.rank = dist.get_rank()
        self.interval = min(1.0, timeout / 10)
        self._label = labels[self.rank]
        self._store = dist.PrefixStore(f"bllkern.parallel.{name}", dist.distributed_c10d._get_default_store())
        self._failure: Exception | None = None
        self._unanswered = False  # a question to the store
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="bllkern heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        try:
            while not self._stopped.wait(self.interval):
                self._store.add(f"beat{self.rank}", 1)
                if self._failure is None and self._store.check(["failure"]):
                    first = self._store.get("failure").decode()
                    self._failure = ParallelError(f"{self._label} ends: {first}")
        except RuntimeError:  # the store is gone: the others cannot be asked either, and time out
            pass

    def stop(self) -> None:
        """End the heartbeat: this rank has done its part."""
        self._stopped.set()
        self._thread.join(5 * self.interval)

    def fail(self, rank: int, error: Exception) -> None:
        """Note, from any thread, that the exchange with ``rank`` failed; the next wait raises it."""
        if self._failure is None and not self._stopped.is_set():
            self._failure = ParallelError(f"{self._label}: {self.labels[rank]} {_first_line(error)}")

    def blame(self, rank: int, error: Exception) -> Exception:
        """The error to raise where ``rank`` sent what it should not."""
        self.fail(rank, RuntimeError(f"sent a wrong message: {_first_line(error)}"))
        return self.report(self._failure)

    def ended(self, rank: int) -> Exception:
        """The error to raise where ``rank`` has ended too early, whatever made it."""
        self.fail(rank, RuntimeError("ended the connection"))
        return self.report(self._failure)

    def lost(self, ranks: list[int], error: Exception) -> Exception:
        """The error to raise where a collective of ``ranks`` failed: the silent ones among them are named."""
        silent = [rank for rank in self._asked(self._silent) or [] if rank in ranks]
        others = silent or [rank for rank in ranks if rank != self.rank]
        blamed = " or ".join(self.labels[rank] for rank in others)
        return self.report(ParallelError(f"{self._label}: lost {blamed}: {_first_line(error)}"))

    def until(self, attempt: Callable[[float], object], rank: int, what: str):
        """``attempt(seconds)`` again and again until it returns something other than ``None``, which is returned.

        Raises ``ParallelError`` once something has failed, or after ``timeout`` seconds of waiting for ``rank``.
        """
        deadline = time.monotonic() + self.timeout
        while self._failure is None:
            found = attempt(SLICE)
            if found is not None:
                return found
            if time.monotonic() > deadline:
                silent = self._asked(self._silent) or [rank]
                blamed = ", ".join(self.labels[r] for r in silent)
                self._failure = ParallelError(
                    f"{self._label}: {blamed} did not answer: waited {self.timeout:g} s for {what}"
                )
        raise self.report(self._failure)

    def report(self, error: Exception) -> Exception:
        """Tell the others why this rank ends; returns the error, with the first one that any rank told."""
        text = _first_line(error)
        first = self._asked(lambda: self._tell(text if isinstance(error, ParallelError) else f"{self._label}: {text}"))
        if first is None or first in text or not isinstance(error, ParallelError):
            return error
        return ParallelError(f"{error} (first error of the job: {first})")

    def _tell(self, text: str) -> str | None:
        """Leave the text in the store, or return the one that is there already."""
        if self._store.add("failures", 1) == 1:
            self._store.set("failure", text)
            return None
        return self._store.get("failure").decode() if self._store.check(["failure"]) else None

    def _silent(self) -> list[int]:
        """The ranks whose heartbeat does not move for three intervals."""
        before = {rank: self._store.add(f"beat{rank}", 0) for rank in self.labels}
        time.sleep(3 * self.interval)
        return [rank for rank, beat in before.items() if self._store.add(f"beat{rank}", 0) == beat]

    def _asked(self, question: Callable[[], object]):
        """The answer to a question about the store, or ``None``.

        A store whose host hangs, or a file that a frozen rank has locked, never answers: then nothing more is asked.
        """
        answers = []

        def ask():
            try:
                answers.append(question())
            except RuntimeError:
                pass

        if not self._unanswered:
            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(5 * self.interval)
            self._unanswered = thread.is_alive()
        return answers[0] if answers else None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
