"""TorchScript, as far as it is used here: it runs operators without Python, and its lock.

torch has deprecated it. Where it is gone, everything stays as it is, and runs call by call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["MISSING", "as_written", "compiled", "compiling", "held"]

T = TypeVar("T")

MISSING = (RuntimeError, AttributeError)  # it does not compile, or torch has no TorchScript
_LOCK = Lock()  # the compiler, and the warnings' filters, are of the whole process


def as_written() -> AbstractContextManager[None]:
    """Let it do what a script says, and watch, fuse and specialise nothing."""
    optimized: Callable[[bool], AbstractContextManager[None]] = torch.jit.optimized_execution  # type: ignore[attr-defined]
    return optimized(False)


@contextmanager
def compiling() -> Iterator[None]:
    """Compile, one thread at a time, and without warnings of what becomes of TorchScript."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compiled(function: Callable[..., T], *constants: Tensor) -> Callable[..., T]:
    """Compile a plain function of tensors, for a CPU; its last arguments are these constants."""
    try:
        with compiling():
            script: Callable[..., T] = torch.jit.script(function)
    except MISSING:
        return lambda *args: function(*args, *constants)
    return _Compiled(script, constants)


class _Compiled(Generic[T]):
    """A function that is compiled, and its constants."""

    def __init__(self, script: Callable[..., T], constants: Sequence[Tensor]) -> None:
        self._script, self._constants, self._kept = script, constants, held(constants)

    def __call__(self, *args: object) -> T:
        with as_written():
            return self._script(*args, *self._constants)


def held(tensors: Sequence[Tensor]) -> object:
    """Return what holds tensors without Python.

    Where Python alone has a tensor, its lock is taken whenever torch lets go of it: 17 of the 28
    times that a call of a network of 23 operators took it.
    """
    if not tensors:
        return None
    try:
        with compiling():
            return torch.jit.script(list(tensors))
    except MISSING:
        return tensors
