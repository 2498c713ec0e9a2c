"""Devices: one pure step, two compilers, and the placement of what they take.

`pmap` keeps a copy of everything on each device and splits the rows of a batch. `jit` works
over a named mesh by sharding annotations: the axis `data` splits the rows of a batch and
the base (FSDP), the axis `tensor` the base alone (tensor parallel). Delta and optimizer
state are small and whole on every device. Both give the same numbers.
"""

import functools
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import aim_jax
from aim_jax import config

AXIS = "data"
AXES = (AXIS, "tensor")
Rules = Sequence[tuple[str, P]]


class Devices(NamedTuple):
    """The mesh (data, tensor) and how steps are compiled for it.

    whole: every device holds the whole base.
    """

    mesh: jax.sharding.Mesh
    mode: str
    whole: bool

    @property
    def count(self) -> int:
        """Number of devices that share a batch's rows."""
        return self.mesh.shape[AXIS]

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, P())


def open_devices(
    cfg: config.Parallel,
    base_bytes: Callable[[], int] = int,
    devices: Sequence[jax.Device] | None = None,
) -> Devices:
    """The mesh of all processes' devices, or of `devices`, and the mode of `cfg`.

    Mode `auto` gives each of several devices the whole base where it can hold it
    (`base_bytes()`, which must leave as much room for all else), by pmap in one process.
    Elsewhere it is jit, which splits the base. Raises InputError where the fields of
    `parallel` do not fit the devices or each other.
    """
    devices = devices or jax.devices()
    mode, count = cfg.mode, len(devices)
    apart = jax.process_count() > 1
    whole = mode == "pmap"
    if mode == "auto":
        several = count > 1 and cfg.tensor == 1
        own = next(d for d in devices if d.process_index == jax.process_index())
        whole = several and _fits(own, base_bytes())
        mode = "pmap" if whole and not apart else "jit"
    if count % cfg.tensor:
        raise aim_jax.InputError(
            f"parallel.tensor: {cfg.tensor} does not divide the {count} devices"
        )
    if mode == "pmap" and cfg.tensor > 1:
        raise aim_jax.InputError("parallel.tensor: above 1 it needs parallel.mode=jit")
    if mode == "pmap" and apart:
        raise aim_jax.InputError("parallel.mode: pmap is for one process; use jit")
    shape = (count // cfg.tensor, cfg.tensor)
    mesh = jax.make_mesh(shape, AXES, (AxisType.Auto,) * 2, devices=devices)
    return Devices(mesh, mode, whole)


def shardings(
    shapes: Mapping[str, Any], rules: Rules, devices: Devices
) -> dict[str, NamedSharding]:
    """The sharding of each parameter of a base by its path.

    rules: (pattern of the whole path, spec of the last axes); a path without a rule is
    replicated, and so is an axis that its devices do not divide.
    """
    return {
        path: _sharding(path, leaf, rules, devices) for path, leaf in shapes.items()
    }


def compile(step: Callable, devices: Devices, batch: int, args: int) -> Callable:
    """`step` compiled; argument number `batch` of `args` is split by rows (axis 1)."""
    if devices.mode == "jit":
        # Said, so that no state comes back split and is compiled for anew.
        return jax.jit(step, out_shardings=devices.replicated)
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
        return _put(batch, NamedSharding(devices.mesh, P(None, AXIS)))
    return {
        k: v.reshape(v.shape[0], devices.count, -1, *v.shape[2:])
        for k, v in batch.items()
    }


def place_rows(batch: dict[str, np.ndarray], devices: Devices) -> dict[str, Any]:
    """A host batch (rows, length) for a jitted function, split by rows."""
    return _put(batch, NamedSharding(devices.mesh, P(AXIS)))


def whole(array: jax.Array) -> np.ndarray:
    """All rows of an array that is split over the devices of all processes."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def agreed(value: bool) -> bool:
    """What `value` is in the first process: for what is read from a disk or a clock."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def check_alike(decision: Any) -> None:
    """Raise AssertionError unless all processes made the same `decision` (JSON)."""
    number = np.uint32(zlib.crc32(json.dumps(decision, sort_keys=True).encode()))
    multihost_utils.assert_equal(number, f"processes have parted: here {decision}")


def meet(name: str) -> None:
    """Wait until every process is here."""
    multihost_utils.sync_global_devices(name)


def _put(
    batch: dict[str, np.ndarray], sharding: jax.sharding.Sharding
) -> dict[str, jax.Array]:
    # Every process has the whole batch, and gives its devices their rows of it.
    return {
        k: jax.make_array_from_callback(v.shape, sharding, v.__getitem__)
        for k, v in batch.items()
    }


def _sharding(path: str, leaf: Any, rules: Rules, devices: Devices) -> NamedSharding:
    # The scale of a quantized weight is split as the weight is.
    path = re.sub("/scale$", "/weight", path)
    spec = next((s for pattern, s in rules if re.fullmatch(pattern, path)), P())
    if devices.whole:
        spec = P()
    spec = (None,) * (len(leaf.shape) - len(spec)) + tuple(spec)
    fitting = [
        axis if axis and size % devices.mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, leaf.shape, strict=True)
    ]
    return NamedSharding(devices.mesh, P(*fitting))


def _fits(device: jax.Device, size: int) -> bool:
    """Whether `size` bytes are at most half of the device's memory, if that is known."""
    stats = device.memory_stats() or {}
    return 2 * size <= stats.get("bytes_limit", 2 * size)
