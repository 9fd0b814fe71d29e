"""Batches loaded by a thread ahead of need, into buffers that are used again and again."""

import copy
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gpt2_data.loader import TokenLoader

Pair = tuple[NDArray[np.int64], NDArray[np.int64]]
Allocate = Callable[[tuple[int, ...], np.dtype[np.int64]], NDArray[np.int64]]


class Prefetch:
    """What `TokenLoader.prefetch` returns: its batches for ever. Use it as a context manager, or call `close`."""

    def __init__(self, loader: "TokenLoader", depth: int, allocate: Allocate | None) -> None:
        if depth < 1:
            raise ValueError(f"prefetch depth {depth} must be 1 or more")
        self._loader, self._depth = loader, depth
        self._position = loader.samples_consumed
        self._held: deque[Pair] = deque()  # yielded and still valid, the oldest first
        self._free: queue.SimpleQueue[Pair] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Pair | BaseException] = queue.SimpleQueue()
        shape, dtype = (loader.batch_size, loader.seq_len), np.dtype(np.int64)
        for _ in range(2 * depth):  # as many held as loaded
            self._free.put(((allocate or np.empty)(shape, dtype), (allocate or np.empty)(shape, dtype)))
        # The thread has a loader, and so open files, of its own. It does not know this object, which can so become
        # garbage and stop it. It is a daemon since Python waits for others at exit before it runs finalizers.
        stop = threading.Event()
        thread = threading.Thread(
            target=_load, args=(copy.deepcopy(loader), self._free, self._ready, stop), daemon=True, name="prefetch"
        )
        self._finalizer = weakref.finalize(self, _stop, thread, self._free, stop)
        thread.start()

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Pair:
        if not self._finalizer.alive:
            raise ValueError("this prefetch is closed")
        if self._loader.samples_consumed != self._position:
            raise ValueError(
                "the loader was moved while it was prefetched: close the prefetch first, then begin another"
            )
        if len(self._held) == self._depth:
            self._free.put(self._held.popleft())
        loaded = self._ready.get()
        if isinstance(loaded, BaseException):
            self.close()
            raise loaded
        self._held.append(loaded)
        self._position += self._loader.batch_size * self._loader.world_size
        self._loader.samples_consumed = self._position
        return loaded

    def state(self) -> dict[str, Any]:
        """The loader's state: after the batches that were yielded, not those loaded ahead."""
        return self._loader.state()

    def close(self) -> None:
        """End the thread, waiting for the batch it is at. The loader may then be used as any other."""
        self._finalizer()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _load(
    loader: "TokenLoader",
    free: "queue.SimpleQueue[Pair]",
    ready: "queue.SimpleQueue[Pair | BaseException]",
    stop: threading.Event,
) -> None:
    try:
        while True:
            pair = free.get()
            if stop.is_set():
                return
            loader.next_into(*pair)
            ready.put(pair)
    except BaseException as error:  # the consumer raises it
        ready.put(error)


def _stop(thread: threading.Thread, free: "queue.SimpleQueue[Pair]", stop: threading.Event) -> None:
    stop.set()
    nothing = np.empty(0, np.int64)
    free.put((nothing, nothing))  # wakes it
    if thread is not threading.current_thread():  # which may be where the garbage was found
        thread.join()
