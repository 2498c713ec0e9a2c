"""Programs that are compiled before they are called, on threads of their own.

XLA compiles a program on few cores. A run has dozens of programs, since every length has
its own, and the later ones can be compiled while the first trains.
"""

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

_threads: concurrent.futures.Executor | None = None


class Program:
    """A compiled function whose call waits where it is being compiled already."""

    def __init__(self, function: Callable):
        self.function = function
        self.begun: dict[tuple, concurrent.futures.Future] = {}

    def __call__(self, *args: Any) -> Any:
        begun = self.begun and self.begun.get(_shapes(args))
        if begun and not begun.cancelled():
            begun.result()
        return self.function(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)


@contextlib.contextmanager
def threads() -> Iterator[None]:
    """Within it `compile` has threads, one less than there are cores.

    Several processes, which would have to compile in the same order, have none.
    """
    global _threads
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if count == 1 or jax.process_count() > 1:
        yield
        return
    _threads = concurrent.futures.ThreadPoolExecutor(count - 1)
    try:
        yield
    finally:
        _threads.shutdown(cancel_futures=True)
        _threads = None


def working() -> bool:
    """Whether there are threads that compile."""
    return _threads is not None


def compile(function: Callable, *args: Any) -> None:
    """Begin to compile a `Program` for arguments like these, if there are threads.

    Arrays may be ShapeDtypeStruct; they lie where those will that it is called with.
    """
    if not _threads or not isinstance(function, Program):
        return

    def run() -> None:
        function.function.lower(*args).compile()  # JAX remembers it.

    key = _shapes(args)
    begun = function.begun.get(key)
    if begun is None or begun.cancelled():
        function.begun[key] = _threads.submit(run)


def _shapes(args: tuple) -> tuple:
    return tuple(map(np.shape, jax.tree.leaves(args)))
