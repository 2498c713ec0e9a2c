"""The contract of a continual-learning method: a NamedTuple of optional hooks.

A method is one file of this folder. It defines `Options`, a frozen dataclass that extends
`methods.Options` with the method's own fields, and `make(options) -> Method`. The name of
the file is the name of the method. No method owns a loop, compiles or places anything.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import aim_jax


@dataclasses.dataclass(frozen=True)
class Options:
    """Fields that every method has."""

    name: str = ""
    preset: str = "release"


class Memo(NamedTuple):
    """What a method remembers: saved with the state, of fixed shapes.

    arrays: pytree of device arrays, an argument of the compiled train step.
    host: a JSON-able frozen dataclass (or None) that only the host sees.
    """

    arrays: Any = ()
    host: Any = None


def revive(host: Any, data: dict[str, Any] | None) -> Any:
    """The host part of a memo that JSON turned into `data`; `host`: a fresh one."""
    if host is None:
        return None
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return dataclasses.replace(host, **values)


class Signals(NamedTuple):
    """What the host reads after a step: plain numbers.

    step: number of the step in its task, from 1; total: steps of the task; history: loss
    on a memory batch after the step (None where no probe took place); distance:
    Euclidean norm of the step's change; penalty: None for a method without one.
    """

    step: int
    total: int
    loss: float
    grad_norm: float
    lr: float
    movement: float
    history: float | None = None
    distance: float = 0.0
    penalty: float | None = None


class Tools(NamedTuple):
    """What a method may know of the task, and compiled functions that it may call.

    number: of the task in the stream, from 0; remembered: rows in the memory
    rehearse(state, memo, step, count) -> (state, losses): `count` updates on memory
        batches, drawn for this step; losses: their loss before each update, host floats
    fuse(origin, inner, outer, w_in, w_out) -> (delta, motion): `fusion.fuse`
    fresh(number) -> delta: a new adapter, another one for each number; the run begins with
        number 0, which is the adapter of `lora.path` if there is one
    fisher(state, memo, rows) -> mean over `rows` of the task's train rows (None: all) of
        the squared gradient of a row's log-likelihood, a tree like the delta
    """

    number: int
    remembered: int
    rehearse: Callable
    fuse: Callable
    fresh: Callable
    fisher: Callable


class Method(NamedTuple):
    """Hooks of a method, each optional.

    memory: the method needs the rehearsal memory of earlier tasks.
    alone: an adapter is trained on each task alone, so that no other's rows validate it.
    probe: the loss on a memory batch is measured after every so many steps of a task with
        memory; 0: never.
    probe_dropout: with the dropout of training.
    rows(stream, number, memory) -> rows to train task `number` on; stream: the train rows
        of each task; memory: those kept of earlier tasks; without any, the task is skipped
    start(delta, tasks) -> memo                       host, once a run of so many tasks
    compose(delta, arrays) -> adapter
        inside the compiled steps: what the model runs with, where that is not the delta
    penalty(delta, arrays) -> scalar
        inside the compiled train step: added to the mean loss, once an optimizer step
    rehearsal_penalty(delta, arrays) -> scalar        likewise, in rehearsal steps
    carry(delta) -> tree
        what compiled steps carry on in `state.carry`, as it is before each task
    gradients(state, grads, magnitudes, arrays, rehearsal) -> (grads, carry)
        inside the compiled steps: what the optimizer gets in place of the gradients of the
        loss, and the new `state.carry`; rehearsal: whether the step is on the memory
    magnitudes: with sums over tokens of |A x| (..., r) as `a`, of |output| (..., out) as
        `b`, in a tree like the delta; else they are None
    before_task(tools, state, memo) -> (state, memo)  host
    after_step(tools, state, memo, signals) -> (state, memo, record or None)
        host; a state other than the one given means that the adapter was rehearsed or
        merged; `record` (a flat dict), where it was merged, becomes a row of merges.jsonl
    after_task(tools, state, memo) -> (state, memo)   host
    adapter(delta, memo, number) -> adapter
        host: what task `number` is evaluated with and exported, where that is not what
        training ended with
    status(memo) -> dict                              host, shown beside the losses
    """

    memory: bool = False
    alone: bool = False
    probe: int = 0
    probe_dropout: bool = False
    rows: Callable | None = None
    start: Callable | None = None
    compose: Callable | None = None
    penalty: Callable | None = None
    rehearsal_penalty: Callable | None = None
    carry: Callable | None = None
    gradients: Callable | None = None
    magnitudes: bool = False
    before_task: Callable | None = None
    after_step: Callable | None = None
    after_task: Callable | None = None
    adapter: Callable | None = None
    status: Callable | None = None


def names() -> list[str]:
    """Names of all methods, in alphabetical order."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """The module of a method. Raises InputError that lists the methods for another name."""
    if name not in names():
        raise aim_jax.InputError(
            f"method.name: no method '{name}'; there are {', '.join(names())}"
        )
    return importlib.import_module(f"{__name__}.{name}")
