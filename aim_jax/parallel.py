"""Devices: one pure step, two compilers, and the placement of what they take.

`pmap` keeps a copy of everything on each device and splits the rows of a batch; `jit`
does the same over a named mesh by sharding annotations. Both give the same numbers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"


class Devices(NamedTuple):
    """The mesh and how steps are compiled for it."""

    mesh: jax.sharding.Mesh
    mode: str

    @property
    def count(self) -> int:
        """Number of devices that share a batch's rows."""
        return self.mesh.size

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, P())


def open_devices(mode: str) -> Devices:
    """All local devices; `auto` is pmap where there are several, else jit."""
    devices = jax.local_devices()
    if mode == "auto":
        mode = "pmap" if len(devices) > 1 else "jit"
    mesh = jax.make_mesh(
        (len(devices),), (AXIS,), devices=devices, axis_types=(AxisType.Auto,)
    )
    return Devices(mesh, mode)


def compile(step: Callable, devices: Devices, batch: int, args: int) -> Callable:
    """`step` compiled; argument number `batch` of `args` is split by rows (axis 1)."""
    if devices.mode == "jit":
        return jax.jit(step)
    return jax.pmap(
        functools.partial(step, axis=AXIS),
        axis_name=AXIS,
        in_axes=tuple(1 if i == batch else None for i in range(args)),
        out_axes=None,
        devices=list(devices.mesh.devices.flat),
    )


def place(batch: dict[str, np.ndarray], devices: Devices) -> dict[str, Any]:
    """A host batch (micro-batches, rows, length) on the devices, split by rows."""
    if devices.mode == "jit":
        return jax.device_put(batch, NamedSharding(devices.mesh, P(None, AXIS)))
    return {
        k: v.reshape(v.shape[0], devices.count, -1, *v.shape[2:])
        for k, v in batch.items()
    }


def place_rows(batch: dict[str, np.ndarray], devices: Devices) -> dict[str, Any]:
    """A host batch (rows, length) for a jitted function, split by rows."""
    return jax.device_put(batch, NamedSharding(devices.mesh, P(AXIS)))


def rows(count: int, devices: Devices) -> int:
    """`count` rounded up to a multiple of the number of devices."""
    return -(-count // devices.count) * devices.count
