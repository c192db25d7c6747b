"""A CPU plays a device with streams: which operations could meet if one wait were missing.

:class:`Recorder` writes down what every stream is given; :func:`races` gives each operation a vector clock.  Two
operations on different streams that touch the same memory, one of them writing, must be ordered by waits; so must the
uses of a tensor that was freed and the next allocation on its stream, unless the allocator was told (``keep``).
Backward operations run on the stream of their forward operation, as autograd's engine has it on a GPU; it also makes a
stream wait where a gradient comes from another one, and the caller's stream for all that a backward pass used.
"""

from collections import Counter

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bllkern.execution.streams import NoStreams, tensors


class Recorder(NoStreams):
    """Streams that are names, and the trace of what they are given: tuples of a kind and its details."""

    blocks, feedback, copies = ["A", "B", "C"], "F", "copies"

    def __init__(self):
        self.now, self.trace, self.events = "main", [], 0
        self.storages: dict[int, tuple[int, StorageWeakRef]] = {}  # memory by number
        self.numbers = 0
        self.graph, self.operations = _Graph(self), _Operations(self)

    def current(self):
        return self.now

    def use(self, stream):
        self.now = stream

    def record(self, stream):
        self.events += 1
        self.trace.append(("record", self.events, stream))
        return self.events

    def wait(self, stream, event):
        self.trace.append(("wait", event, stream))

    def keep(self, tree, stream):
        self.trace.extend(("keep", memory, stream) for memory in self.memory(tensors(tree)))

    def used(self) -> set:
        """The streams that were given an operation."""
        return {entry[2] for entry in self.trace if entry[0] == "launch"}

    def memory(self, tensors) -> list[int]:
        found = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.storages:
                self.numbers += 1
                self.storages[storage._cdata] = self.numbers, StorageWeakRef(storage)
            found.append(self.storages[storage._cdata][0])
        return found

    def notice_freed(self):
        for key, (number, storage) in list(self.storages.items()):
            if storage.expired():
                del self.storages[key]
                self.trace.append(("free", number, None))

    def __enter__(self):
        self.graph.__enter__()
        self.operations.__enter__()
        return self

    def __exit__(self, *error):
        self.operations.__exit__(*error)
        self.graph.__exit__(*error)


class _Graph(TorchFunctionMode):
    """Knows the stream of every node of the graph, and ends every backward pass as the engine does."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder, self.streams, self.producers = recorder, {}, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is Tensor.backward:
            self.recorder.trace.append(("end backward", None, self.recorder.now))
        stack = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        while stack:
            node = stack.pop()
            if node is not None and node not in self.streams:
                self.streams[node] = self.recorder.now
                for function, _ in node.next_functions:
                    self.producers.setdefault(function, []).append(node)
                    stack.append(function)
        return result


class _Operations(TorchDispatchMode):
    """Writes down every operation: its stream and node, what it reads, writes and allocates."""

    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        recorder, kwargs = self.recorder, kwargs or {}
        recorder.notice_freed()
        reads, writes = self._accesses(func, args, kwargs)
        numbers = recorder.numbers
        result = func(*args, **kwargs)
        if any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            return result  # a view
        made = recorder.memory(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        made = [number for number in made if number > numbers]
        node = torch._C._current_autograd_node()
        stream = recorder.now if node is None else recorder.graph.streams.get(node, recorder.now)
        recorder.trace.append(("launch", func._schema.name, stream, node, recorder.now, reads, writes, made))
        return result

    def _accesses(self, func, args, kwargs):
        reads, writes = [], []
        for i, argument in enumerate(func._schema.arguments):
            value = kwargs.get(argument.name, args[i] if i < len(args) else None)
            memory = self.recorder.memory(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
            written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if written else reads).extend(memory)
        only_shape = func._schema.name.endswith("_like") or "::new_" in func._schema.name
        return ([] if only_shape else reads), writes


def races(recorder: Recorder, dropped: int | None = None, keeps: bool = True) -> list[str]:
    """What could meet in the trace, without the wait number ``dropped``, or without what was kept."""
    checker, waits = _Checker(recorder.graph.producers), 0
    for kind, what, stream, *details in recorder.trace:
        if kind == "launch":
            checker.launch(what, stream, *details)
        elif kind == "record":
            checker.events[what] = checker.clock(stream).copy()
        elif kind == "wait":
            if waits != dropped:
                checker.clocks[stream] = checker.clock(stream) | checker.events[what]
            waits += 1
        elif kind == "keep" and keeps:
            checker.kept.setdefault(what, set()).add(stream)
        elif kind == "free":
            checker.freed.append(what)
        elif kind == "end backward":
            checker.end_backward(stream)
    return checker.found


class _Checker:
    def __init__(self, producers):
        self.producers = producers
        self.clocks, self.events, self.done, self.found = {}, {}, {}, []
        self.owner, self.reads, self.writes, self.kept, self.freed = {}, {}, {}, {}, []
        self.backward = set()

    def clock(self, stream) -> Counter:
        return self.clocks.setdefault(stream, Counter())

    def launch(self, name, stream, node, caller, reads, writes, made):
        clock = self.clock(stream)
        if node is not None:
            self.backward.add(stream)
            clock |= self._gradient_of(node) or self.clock(caller)
            self.clocks[stream] = clock
        clock[stream] += 1
        for memory in reads:
            self._check(name, stream, self.writes.get(memory, {}))
            self.reads.setdefault(memory, Counter())[stream] = clock[stream]
        for memory in [*writes, *made]:
            self._check(name, stream, self.writes.get(memory, Counter()) | self.reads.get(memory, Counter()))
            self.writes.setdefault(memory, Counter())[stream] = clock[stream]
        for memory in made:
            self.owner[memory] = stream
        if made:
            self._reuse(name, stream)
        if node is not None:
            self.done[node] = clock.copy()

    def _gradient_of(self, node) -> Counter:
        """What the operations whose gradients ``node`` reads have waited for, and they themselves."""
        known = Counter()
        for producer in self.producers.get(node, ()):
            known |= self.done[producer] if producer in self.done else self._gradient_of(producer)
        return known

    def _check(self, name, stream, times):
        late = [other for other, time in times.items() if time > self.clock(stream)[other]]
        if late:
            self.found.append(f"{name} on {stream} does not wait for {late}")

    def _reuse(self, name, stream):
        for memory in [memory for memory in self.freed if self.owner.get(memory) == stream]:
            self.freed.remove(memory)
            uses = self.reads.get(memory, Counter()) | self.writes.get(memory, Counter())
            unknown = {s: time for s, time in uses.items() if s not in self.kept.get(memory, ())}
            self._check(f"{name}, given freed memory,", stream, unknown)

    def end_backward(self, caller):
        for stream in self.backward:
            self.clocks[caller] = self.clock(caller) | self.clock(stream)
        self.backward = set()
