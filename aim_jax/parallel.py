"""Devices: one pure step, two compilers, and the placement of what they take.

`pmap` keeps a copy of everything on each device and splits the rows of a batch. `jit` works
over a named mesh by sharding annotations: the axis `data` splits the rows of a batch and
the base (FSDP), the axis `tensor` the base alone (tensor parallel). Delta and optimizer
state are small and whole on every device. On as many devices both give the same numbers,
dropout included, but for rounding; `exact` gives the same bits on 1, 2, 4 and 8 devices.
"""

import dataclasses
import functools
import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import aim_jax
from aim_jax import config

AXIS = "data"
AXES = (AXIS, "tensor")
SHARDS = 8  # parts of a batch in mode exact, whatever number of devices there is
Rules = Sequence[tuple[str, P]]
Tree = Any


class Axis(NamedTuple):
    """What a step knows of the devices, or shards, that share the rows of its batch.

    index() -> number of this one; sum(tree) -> its sum over all; max(array) -> that of all,
    or where they share nothing its own; loop: as fori_loop.
    """

    index: Callable[[], Any]
    sum: Callable[[Tree], Tree]
    max: Callable[[jax.Array], jax.Array]
    loop: Callable = jax.lax.fori_loop


class Devices(NamedTuple):
    """The mesh (data, tensor) and how steps are compiled for it.

    whole: every device holds the whole base.
    """

    mesh: jax.sharding.Mesh
    mode: str
    whole: bool

    @property
    def count(self) -> int:
        """Number of parts that a batch's rows are split into."""
        return SHARDS if self.mode == "exact" else self.mesh.shape[AXIS]

    def sized(self, data: config.Data) -> config.Data:
        """`data` with the rows that a device takes at once, where it says nothing of them."""
        rows = 4 if self.mesh.devices.flat[0].platform == "cpu" else 8
        return dataclasses.replace(data, device_rows=data.device_rows or rows)

    @property
    def replicated(self) -> jax.sharding.Sharding:
        """The sharding of what every device holds whole; in mode exact, the first."""
        if self.mode == "exact":
            return SingleDeviceSharding(self.owners[0])
        return NamedSharding(self.mesh, P())

    @property
    def owners(self) -> list[jax.Device]:
        """In mode exact, the device of each shard."""
        devices = list(self.mesh.devices.flat)
        return [devices[i * len(devices) // SHARDS] for i in range(SHARDS)]


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
    if cfg.exact:
        mode = "exact"
        if cfg.mode != "auto" or cfg.tensor > 1 or apart or SHARDS % count:
            raise aim_jax.InputError(
                "parallel.exact: needs one process, parallel.mode=auto, parallel.tensor=1"
                f" and 1, 2, 4 or 8 devices; here are {jax.process_count()}, {cfg.mode},"
                f" {cfg.tensor} and {count}"
            )
    whole = mode in ("pmap", "exact")
    if mode == "auto":
        several = count > 1 and cfg.tensor == 1
        own = next(d for d in devices if d.process_index == jax.process_index())
        whole = several and agreed(_fits(own, base_bytes()))
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


def compile(
    step: Callable, devices: Devices, batch: int, args: int, split: int = 1
) -> Callable:
    """`step` compiled; `split` arguments of `args`, from number `batch`, are split by rows.

    One after them is the number of steps in a chunk. Mode exact takes one batch alone.
    """
    if devices.mode == "exact":
        return _exact(step, devices, batch, chunk=args > batch + 1)
    if devices.mode == "jit":
        # Said, so that no state comes back split and is compiled for anew.
        return jax.jit(within(step, devices), out_shardings=devices.replicated)
    axis = Axis(
        lambda: jax.lax.axis_index(AXIS),
        lambda x: jax.lax.psum(x, AXIS),
        lambda x: jax.lax.pmax(x, AXIS),
    )
    return jax.pmap(
        functools.partial(step, axis=axis),
        axis_name=AXIS,
        in_axes=tuple(0 if 0 <= i - batch < split else None for i in range(args)),
        out_axes=None,
        devices=list(devices.mesh.devices.flat),
    )


def within(step: Callable, devices: Devices) -> Callable:
    """`step`, which knows the mesh while it is traced (`layers.by_rows`)."""
    if devices.mode == "exact":
        return step

    @functools.wraps(step)
    def run(*args: Tree, **named: Tree) -> Tree:
        with jax.sharding.use_abstract_mesh(devices.mesh.abstract_mesh):
            return step(*args, **named)

    return run


def place(batch: dict[str, np.ndarray], devices: Devices) -> dict[str, Any]:
    """A host batch (..., rows, length) on the devices, split by rows."""
    before = batch["inputs"].shape[:-2]
    if devices.mode == "jit":
        spec = P(*(None for _ in before), AXIS)
        return _put(batch, NamedSharding(devices.mesh, spec))
    if devices.mode == "exact":
        return _split(batch)
    return {
        k: np.moveaxis(v.reshape(*before, devices.count, -1, v.shape[-1]), -3, 0)
        for k, v in batch.items()
    }


def replicate(tree: Tree, devices: Devices) -> Tree:
    """`tree`, of arrays alike in all processes, whole on every device.

    Not by `jax.device_put` over several processes: where each has one device, it makes of
    an array of that device (jax 0.10.2) one that cannot be read.
    """
    sharding = devices.replicated
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def of(x: Any) -> jax.Array:
        whole = getattr(x, "sharding", None) == sharding
        return x if whole else _put(np.asarray(x), sharding)

    return jax.tree.map(of, tree)


def by_rows(
    f: Callable, base: Tree, batch: dict[str, np.ndarray], devices: Devices
) -> np.ndarray:
    """A jitted `f(base, batch)` of a host batch (rows, length), split by rows."""
    found = lanes(devices)
    shards = _split(batch) if len(found) > 1 else [batch]
    made = [
        (lane, f(lane.own(base), lane.put(shard)))
        for lane, shard in zip(found, shards, strict=True)
    ]
    return np.concatenate([lane.get(rows) for lane, rows in made])


class Lane(NamedTuple):
    """Devices that run one program on rows that they share.

    count: parts that the rows are split into. own(tree): what all rows need, where the
    program finds it; put(tree): host arrays (rows, ...), split; get(tree): NumPy arrays.
    """

    count: int
    own: Callable[[Tree], Tree]
    put: Callable[[Tree], Tree]
    get: Callable[[Tree], Tree]


def lanes(devices: Devices) -> list[Lane]:
    """All devices, or in mode exact every shard alone."""
    if devices.mode == "exact":
        return [
            Lane(1, *(functools.partial(_copy, device=d),) * 2, jax.device_get)
            for d in devices.owners
        ]
    rows = NamedSharding(devices.mesh, P(AXIS))
    put = functools.partial(_put, sharding=rows)
    get = functools.partial(multihost_utils.process_allgather, tiled=True)
    return [Lane(devices.count, lambda tree: tree, put, get)]


def spread(tree: Tree, axis: Callable[[Any], int | None], devices: Devices) -> Tree:
    """What decoding keeps from token to token, said to lie where its products are.

    axis(leaf): that of the rows, None for none. Beside a whole base every device keeps its
    rows. A split base stays where it is, since it is larger than a token of each row: keys
    and values (..., rows, heads, length, features) are split by heads or features as it
    is, and all else is whole.
    """
    if devices.mode == "exact":
        return tree

    def of(x: jax.Array) -> jax.Array:
        place, names = axis(x), [()] * x.ndim
        if place is not None and devices.whole:
            names[place] = (AXIS,)
        elif x.ndim >= 4:
            sizes = {i: x.shape[i] for i in (place + 1, place + 3, place)}
            for name in reversed(AXES):
                parts = devices.mesh.shape[name]
                fitting = next((i for i in sizes if sizes[i] % parts == 0), None)
                if fitting is not None:
                    names[fitting] += (name,)
                    sizes[fitting] //= parts
        split = NamedSharding(devices.mesh, P(*(n or None for n in names)))
        return jax.lax.with_sharding_constraint(x, split)

    return jax.tree.map(of, tree)


def agreed(value: bool) -> bool:
    """What `value` is in the first process: for what is read from a disk or a clock."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def check_alike(decision: Any) -> None:
    """Raise AssertionError unless all processes made the same `decision` (JSON)."""
    told = f"processes have parted: here {decision}"
    multihost_utils.assert_equal(_number(decision), told)


def differing(told: dict[str, Any]) -> list[str]:
    """The names of `told` (JSON by name) of which not all processes were told the same.

    If their names are not the same, all of this one's.
    """
    if jax.process_count() == 1:
        return []
    try:
        check_alike(list(told))
    except AssertionError:
        return list(told)
    numbers = np.array([_number(x) for x in told.values()])
    found = multihost_utils.process_allgather(numbers)
    return [name for name, x in zip(told, found.T, strict=True) if (x != x[0]).any()]


def meet(name: str) -> None:
    """Wait until every process is here."""
    multihost_utils.sync_global_devices(name)


def _number(value: Any) -> np.uint32:
    """What stands for a JSON value where processes compare theirs."""
    return np.uint32(zlib.crc32(json.dumps(value, sort_keys=True).encode()))


def _exact(step: Callable, devices: Devices, batch: int, chunk: bool) -> Callable:
    """`step` in programs of one device each, the same for any number of devices.

    XLA compiles a program for one device and one for several in different ways, and so
    they round differently. Here what the rows of a shard add up to is one program, run on
    the shard's device; the rest of the step is another, run on the first device, which
    adds the sums up in the order of the shards. What of `step` a program does not need,
    the compiler leaves out.
    """

    def unrolled(first: int, last: int, body: Callable, carry: Tree) -> Tree:
        for i in range(first, last):
            carry = body(i, carry)
        return carry

    def own(x: jax.Array) -> jax.Array:
        return x

    owners, count = devices.owners, (1,) if chunk else ()

    @jax.jit
    def part(number: jax.Array, *args: Tree) -> Tree:
        sums = []

        def note(tree: Tree) -> Tree:
            sums.append(tree)
            return tree

        step(*args, *count, axis=Axis(lambda: number, note, own, unrolled))
        return sums[0]

    @jax.jit
    def rest(sums: list[Tree], *args: Tree) -> Tree:
        total = functools.reduce(lambda a, b: jax.tree.map(jax.numpy.add, a, b), sums)
        return step(*args, *count, axis=Axis(lambda: 0, lambda _: total, own, unrolled))

    def run(*args: Tree) -> Tree:
        copies = {d: _copy(args[:batch], d) for d in set(owners)}
        shards = args[batch]
        sums = [part(i, *copies[d], shards[i]) for i, d in enumerate(owners)]
        return rest(_copy(sums, owners[0]), *copies[owners[0]], shards[0])

    def steps(base: Tree, state: Tree, memo: Tree, shards: list, number: int) -> tuple:
        losses = []
        for i in range(number):
            one = [{k: v[i : i + 1] for k, v in s.items()} for s in shards]
            state, values = run(base, state, memo, one)
            losses.append(values[0])
        return state, losses

    return steps if chunk else run


def _split(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The shards of a host batch (..., rows, length)."""
    parts = {k: np.split(v, SHARDS, axis=-2) for k, v in batch.items()}
    return [{k: v[i] for k, v in parts.items()} for i in range(SHARDS)]


def _copy(tree: Tree, device: jax.Device) -> Tree:
    """`tree` on one device: the copies that are there, others are made."""

    def of(x: jax.Array | np.ndarray) -> jax.Array:
        shards = getattr(x, "addressable_shards", ())
        there = [s.data for s in shards if s.device == device]
        return there[0] if there else jax.device_put(x, device)

    return jax.tree.map(of, tree)


def _put(tree: Tree, sharding: jax.sharding.Sharding) -> Tree:
    """Host arrays on the devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # Every process has them whole, and gives its devices their part.
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, x.__getitem__), tree
    )


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
