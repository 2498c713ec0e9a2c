"""Will it fit, and how fast could it be: `python -m aim_jax.plan --config FILE --topology T`.

Compiles the programs of a run ahead of time for TPUs or GPUs that need not be there, from
shapes alone. Bytes per chip are the compiler's; FLOPs are counted in the jaxpr and bytes of
collectives in the compiled program, both times the turns of the loops around them. The
step time is an estimate: a roofline over the published peaks of the chip. Nothing is run.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import aim_jax
from aim_jax import config, evaluate, lora, methods, parallel, steps
from aim_jax.data import batches
from aim_jax.models import hf

Tree = Any
PROGRAMS = ("train", "probe", "rehearse", "decode")


class Chip(NamedTuple):
    """Published peaks: bf16 FLOP/s, bytes/s of memory and of links, bytes of memory.

    Source: cloud.google.com/tpu/docs, pages v5e, v5p and v6e, "system architecture"; the
    rate of the links is their "interchip interconnect bandwidth per chip". NVIDIA's data
    sheets of A100 80GB, H100 and H200 SXM: dense products, and NVLink one way.
    """

    flops: float
    memory_rate: float
    link_rate: float
    memory: float


CHIPS = {
    "v5e": Chip(197e12, 819e9, 200e9, 16e9),
    "v5p": Chip(459e12, 2765e9, 600e9, 95e9),
    "v6e": Chip(918e12, 1640e9, 448e9, 32e9),
    "a100": Chip(312e12, 2039e9, 300e9, 80e9),
    "h100": Chip(989e12, 3350e9, 450e9, 80e9),
    "h200": Chip(989e12, 4800e9, 450e9, 141e9),
}
# What the GPU compiler asks of a device: compute capability, multiprocessors, bytes of L2
# and of shared memory (of a multiprocessor, of a block), GHz.
HOPPER = (9, 132, 52428800, 233472, 232448, 1.98)
GPUS = {"a100": (8, 108, 41943040, 167936, 166912, 1.41)} | dict.fromkeys(
    ("h100", "h200"), HOPPER
)


class Work(NamedTuple):
    """What the matrix products of a program take, over all devices together.

    Those with weights, which all rows share, and those of activations with each other:
    FLOPs of each, bytes of the weights, and bytes of all other operands and results.
    """

    weight_flops: float = 0
    other_flops: float = 0
    weight_bytes: float = 0
    other_bytes: float = 0

    @property
    def flops(self) -> float:
        """All of them."""
        return self.weight_flops + self.other_flops

    @property
    def trained(self) -> float:
        """FLOPs of a train step whose forward pass this is, nothing computed twice.

        A frozen weight takes one product more, backward to its input; two activations
        take two.
        """
        return 2 * self.weight_flops + 3 * self.other_flops


class Program(NamedTuple):
    """A compiled computation, its arguments as shapes on shardings, and what it must do.

    turns: how often its loop runs that no number bounds; needed: FLOPs, None for all.
    """

    function: Callable
    arguments: tuple
    turns: int = 1
    needed: float | None = None


def plan(
    cfg: config.Config,
    devices: parallel.Devices,
    chip: Chip | None,
    length: int,
    target: int,
    names: Sequence[str] = PROGRAMS,
) -> Iterator[dict[str, Any]]:
    """One row for each program: train step, probe, rehearsal step, decoding of a batch.

    length, target: tokens of a row, and of its answer, which `length` includes.
    Raises InputError for a batch that the devices do not divide, and for a row that its
    answer fills.
    """
    if length <= target:
        raise aim_jax.InputError(
            f"--length {length}: a row has its answer in it, --target {target}"
        )
    for size in (cfg.train.batch_size, cfg.memory.batch_size, cfg.eval.batch_size):
        if size % devices.count:
            raise aim_jax.InputError(
                f"{size} rows at once are no multiple of the {devices.count} groups of"
                " devices that share them; set train.batch_size, memory.batch_size and"
                " eval.batch_size"
            )
    made = programs(cfg, devices, length, target)
    for name in names:
        yield {"program": name, **measured(made[name](), devices.mesh, chip)}


def describe(topology: str, cfg: config.Parallel) -> tuple[Chip, parallel.Devices]:
    """Peaks and mesh of a topology: v5e:2x4 chips a side, h200:2x8 machines and GPUs."""
    kind, _, sides = topology.partition(":")
    if kind not in CHIPS:
        raise aim_jax.InputError(
            f"--topology {topology}: the kinds are {', '.join(CHIPS)}, as in v5e:2x4"
            " or h200:8"
        )
    try:
        if kind in GPUS:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name=topology,
                topology="x".join(["1", "1", *sides.split("x")][-3:]),
                target_config=_gpu(kind),
            )
        else:
            # What a machine of that kind would be told by its metadata server.
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            # A machine has four chips, unless it has one.
            one = set(sides) <= set("1x")
            alone = {"chips_per_host_bounds": (1, 1, 1)} if one else {}
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=topology, **alone
            )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        extra = "cuda12" if kind in GPUS else "tpu"
        raise aim_jax.InputError(
            f"--topology {topology}: {error}; its compiler comes with"
            f" pip install 'jax[{extra}]'"
        ) from None
    return CHIPS[kind], parallel.open_devices(cfg, devices=found.devices)


def _gpu(kind: str) -> str:
    """XLA's GpuTargetConfigProto of a kind, as text."""
    capability, cores, l2, shared, block, clock = GPUS[kind]
    chip = CHIPS[kind]
    return f"""
        platform_name: "CUDA"
        device_description_str: "NVIDIA {kind.upper()}"
        dnn_version_info {{ major: 9 minor: 8 }}
        runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
            cuda_compute_capability {{ major: {capability} }}
            core_count: {cores}
            l2_cache_size: {l2}
            shared_memory_per_core: {shared}
            shared_memory_per_block: 49152
            shared_memory_per_block_optin: {block}
            clock_rate_ghz: {clock}
            memory_bandwidth: {chip.memory_rate:.0f}
            device_memory_size: {chip.memory:.0f}
            threads_per_block_limit: 1024
            threads_per_core_limit: 2048
            threads_per_warp: 32
            fpus_per_core: {64 if capability == 8 else 128}
            registers_per_block_limit: 65536
            registers_per_core_limit: 65536
            block_dim_limit_x: 2147483647
            block_dim_limit_y: 65535
            block_dim_limit_z: 65535
        }}"""


def programs(
    cfg: config.Config, devices: parallel.Devices, length: int, target: int
) -> dict[str, Callable[[], Program]]:
    """What makes the program of each name."""
    family, model = hf.build(cfg.model, devices)
    whole, keys = devices.replicated, family.keys(model.config)
    kept = hf.parameters(cfg.model, model, keys)
    places = parallel.shardings(kept, family.RULES, devices)
    base = hf.unflatten({path: _on(leaf, places[path]) for path, leaf in kept.items()})
    delta = jax.eval_shape(lambda: lora.init(jax.random.key(0), base, keys, cfg.lora))
    state = jax.eval_shape(lambda: steps.init(delta, 1, jax.random.key(0)))
    delta, state = (_on(tree, whole) for tree in (delta, state))
    inputs = length - target if family.KIND == "encdec" else length
    # Every row is that long.
    data = dataclasses.replace(
        devices.sized(cfg.data), buckets=(inputs,), target_buckets=(target,)
    )
    text = batches.Text(None, family.KIND, data, devices.count, inputs)
    example = batches.Example("", np.zeros(length - target), np.zeros(target))
    pure = steps.make(model, dataclasses.replace(cfg, data=data), methods.Method())

    def batch(size: int, *before: int) -> Tree:
        made = batches.collate(text, [[example]], size)
        made = jax.tree.map(lambda x: x.reshape(*before, *x.shape), made)
        axes = P(*(None for _ in (*before, 0)), parallel.AXIS)
        return _on(made, NamedSharding(devices.mesh, axes))

    def forward(size: int) -> Work:
        """That of a batch."""
        arguments = (base, state, (), batch(size, 1))
        return counted(jax.make_jaxpr(pure.probe)(*arguments).jaxpr)

    def train() -> Program:
        size = cfg.train.batch_size
        step = parallel.compile(pure.train, devices, batch=3, args=4)
        arguments = (base, state, (), batch(size))
        return Program(step, arguments, needed=forward(size).trained)

    def probe() -> Program:
        step = parallel.compile(pure.probe, devices, batch=3, args=4)
        return Program(step, (base, state, (), batch(cfg.memory.batch_size, 1)))

    def rehearse() -> Program:
        size = cfg.memory.batch_size
        step = parallel.compile(pure.rehearse, devices, batch=3, args=5)
        count = _on(jax.ShapeDtypeStruct((), jnp.int32), whole)
        arguments = (base, state, (), batch(size, 1), count)
        return Program(step, arguments, needed=forward(size).trained)

    def decode() -> Program:
        prompt = batches.prompts(text, [example], cfg.eval.batch_size)
        prompt = _on(prompt, NamedSharding(devices.mesh, P(parallel.AXIS)))
        limited = dataclasses.replace(cfg.eval, max_length=target + 1)
        cfg_ = dataclasses.replace(cfg, eval=limited)
        decoder = evaluate.greedy(model, (1,), cfg_, devices)
        rows = cfg.eval.batch_size
        places = _on(jax.ShapeDtypeStruct((rows,), jnp.int32), prompt["mask"].sharding)

        @jax.jit
        def step(base: Tree, delta: Tree, batch: Tree, places: jax.Array) -> Tree:
            pool = decoder.empty(base, delta, batch, None, rows)
            pool = decoder.fill(base, delta, pool, batch, places, None)
            return decoder.run(base, delta, pool, rows)

        return Program(step, (base, delta, prompt, places), turns=target)

    return {"train": train, "probe": probe, "rehearse": rehearse, "decode": decode}


def measured(
    program: Program, mesh: jax.sharding.Mesh, chip: Chip | None
) -> dict[str, Any]:
    """What a program takes of a chip, and how long a call would take at its peaks.

    A program that the compiler finds too large has no `collective_bytes`, hence no time.
    """
    function, arguments, turns, needed = program
    work = counted(jax.make_jaxpr(function)(*arguments).jaxpr, turns)
    needed = work.flops if needed is None else needed
    chips = mesh.size
    found = {"flops": work.flops / chips, "needed_flops": needed / chips}
    try:
        built = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        # All of it, or temporaries that alone are too many.
        used = re.search(r"Used ([\d.]+)G of [\d.]+G hbm", str(error)) or re.search(
            r"temporaries \(([\d.]+)G\) exceeds available HBM", str(error)
        )
        if not used:
            raise
        return found | {"bytes": float(used[1]) * 2**30, "fits": False}
    sizes = built.memory_analysis()
    found["argument_bytes"] = sizes.argument_size_in_bytes
    found["bytes"] = (
        sizes.argument_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
    )
    text = built.as_text()
    found["collective_bytes"] = collective_bytes(text, turns)
    if not chip:
        return found
    if mesh.devices.flat[0].platform == "tpu":
        # By the products: a chip reads every weight whole, of the rest its share.
        found["moved_bytes"] = work.weight_bytes + work.other_bytes / chips
    else:
        found["moved_bytes"] = moved_bytes(text, turns)
    seconds = {
        "compute": found["flops"] / chip.flops,
        "memory": found["moved_bytes"] / chip.memory_rate,
        "links": found["collective_bytes"] / chip.link_rate,
    }
    # The three overlap wholly, or not at all.
    spans = max(seconds.values()), sum(seconds.values())
    return found | {
        "fits": found["bytes"] <= chip.memory,
        "seconds": seconds,
        "step_seconds": spans,
        "mfu": [found["needed_flops"] / chip.flops / t for t in spans],
    }


def counted(jaxpr: Any, turns: int = 1) -> Work:
    """Work of the matrix products in a jaxpr, loops included.

    A scan counts its length, a while loop `turns`, a branch the dearest of its kinds.
    """
    total = Work()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            parts, times = [_product(equation)], 1
        elif name.startswith("dot_product_attention_"):
            # Scores and outputs; backward has the scores anew and four gradients.
            parts, times = [_fused(equation, 5 if "bwd" in name else 2)], 1
        elif name == "pallas_call":
            parts, times = [_kernel(equation, turns)], 1
        else:
            times = {"scan": params.get("length"), "while": turns}.get(name, 1)
            if name == "shard_map":  # what each device does
                times = params["mesh"].size
            parts = [counted(j, turns) for j in _inner(params)]
            if name == "cond":
                parts = [max(parts)]
        for part in parts:
            total = Work(*(a + times * b for a, b in zip(total, part, strict=True)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for x in value if isinstance(value, (tuple, list)) else [value]:
            x = getattr(x, "jaxpr", x)
            if hasattr(x, "eqns"):
                yield x


def _product(equation: Any) -> Work:
    """A weight is an operand of two axes; every other operand has rows."""
    (contract, _), (batch, _) = equation.params["dimension_numbers"]
    left, right = (x.aval for x in equation.invars)
    out = equation.outvars[0].aval
    flops = 2 * out.size * math.prod(left.shape[i] for i in contract)
    weights = [x for x in (left, right) if x.ndim == 2 and not batch]
    others = [x for x in (left, right) if x not in weights]
    weight_bytes, other_bytes = (
        sum(x.size * x.dtype.itemsize for x in group)
        for group in (weights, [*others, out])
    )
    if weights:
        return Work(flops, 0, weight_bytes, other_bytes)
    return Work(0, flops, 0, other_bytes)


def _fused(equation: Any, products: int) -> Work:
    """Of an attention that keeps its scores to itself; hidden ones are counted too."""
    (b, t, h, d), (_, s, _, _) = (x.aval.shape for x in equation.invars[:2])
    return Work(0, products * 2 * b * h * t * s * d, 0, _moved(equation))


def _kernel(equation: Any, turns: int) -> Work:
    """Of one whose products are of tiles of activations, once for each place of its grid."""
    runs = math.prod(equation.params["grid_mapping"].grid)
    flops = counted(equation.params["jaxpr"], turns).flops
    return Work(0, runs * flops, 0, _moved(equation))


def _moved(equation: Any) -> float:
    """Bytes of operands and results."""
    arrays = [x.aval for x in (*equation.invars, *equation.outvars)]
    return sum(x.size * x.dtype.itemsize for x in arrays)


# Bytes that leave a chip of n for each byte of the result, in a ring.
COLLECTIVES: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
CONSTANT = r"{} = [su]32\[\]\S* constant\((\d+)\)"  # of that name, in HLO text


def collective_bytes(text: str, turns: int = 1) -> float:
    """Bytes that a chip sends in one call of a compiled program, given as HLO text.

    A loop counts the turns that the compiler knows, or that its condition compares its
    counter with, else `turns`. A collective that is spread over several fusions has one
    channel, and counts once.
    """
    channels = set()
    parts, entry = _computations(text)

    def sent(name: str) -> float:
        total = 0.0
        for line in parts[name].splitlines():
            for called, times in _calls(line, parts, turns):
                if called in parts:
                    total += times * sent(called)
            found = re.search(
                r"= (.*?) (" + "|".join(COLLECTIVES) + r")(-start)?\(", line
            )
            channel = re.search(r"channel_id=(\d+)", line)
            if found and not (channel and channel[1] in channels):
                channels.add(channel and channel[1])
                shapes, kind, start = found.groups()
                sizes = _sizes(shapes)
                # Of a pair (operand, result) the result.
                size = max(sizes) if start else sum(sizes)
                total += size * COLLECTIVES[kind](_group(line))
        return total

    return sent(entry)


def _computations(text: str) -> tuple[dict[str, str], str]:
    """Lines of each computation of HLO text by its name, and the name of the first."""
    parts = re.findall(
        r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.M | re.S
    )
    return dict(parts), re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1]


def _sizes(shapes: str) -> list[int]:
    """Bytes of each array of a type in HLO text."""
    return [
        int(bits or 8) * math.prod(map(int, filter(None, dims.split(",")))) // 8
        for bits, dims in re.findall(r"[a-z]+(\d*)\w*\[([\d,]*)\]", shapes)
    ]


class _Instruction(NamedTuple):
    """Of HLO text: its result is `kind` of the operands; free: no kernel runs for it."""

    bytes: int
    kind: str
    operands: list[str]
    line: str

    @property
    def free(self) -> bool:
        return self.kind in FREE or self.kind.endswith("-done")


FREE = {
    *("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"),
    *("while", "conditional", "call"),
}


def _instructions(body: str) -> dict[str, _Instruction]:
    """By name; the one that a computation returns is the last."""
    found = {}
    for line in body.splitlines():
        parsed = re.match(
            r"\s*(?:ROOT )?%([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*?)\)"
            r"(?:, |$)",
            line,
        )
        if parsed:
            name, shapes, kind, operands = parsed.groups()
            if "cublas" in line:  # beside its result a place to work in
                shapes = re.sub(r"s8\[\d+\]", "", shapes)
            operands = re.findall(r"%([\w.\-]+)", operands)
            found[name] = _Instruction(sum(_sizes(shapes)), kind, operands, line)
    return found


def moved_bytes(text: str, turns: int = 1) -> float:
    """Bytes that the kernels of a program compiled for GPUs read from memory and write.

    Each reads its operands and writes its results; of what it slices, or updates in place,
    that slice. Loops count as for `collective_bytes`.
    """
    parts, entry = _computations(text)
    inside = {name: _instructions(body) for name, body in parts.items()}

    def fusion(body: dict[str, _Instruction]) -> int:
        def read(name: str) -> int:
            total = 0
            for user, each in body.items():
                if name not in each.operands:
                    continue
                if each.kind == "bitcast":
                    total += read(user)
                elif each.kind in ("slice", "dynamic-slice", "gather"):
                    total += each.bytes
                elif each.kind != "dynamic-update-slice" or each.operands[0] != name:
                    return body[name].bytes
            return min(total, body[name].bytes)

        def written(name: str) -> int:
            each = body[name]
            if each.kind == "tuple":
                return sum(map(written, each.operands))
            if each.kind == "bitcast":
                return written(each.operands[0])
            if each.kind == "dynamic-update-slice":
                return body[each.operands[1]].bytes
            return each.bytes

        inputs = [name for name, each in body.items() if each.kind == "parameter"]
        return sum(map(read, inputs)) + written(list(body)[-1])

    def moved(name: str) -> float:
        total = 0.0
        for each in inside[name].values():
            called = _calls(each.line, parts, turns)
            if each.kind in ("fusion", "fusion-start"):
                total += sum(fusion(inside[body]) for body, _ in called)
            elif each.free:
                total += sum(times * moved(body) for body, times in called)
            else:
                operands = (inside[name][x].bytes for x in each.operands)
                total += each.bytes + sum(operands)
        return total

    return moved(entry)


def _calls(line: str, parts: dict[str, str], turns: int) -> Iterator[tuple[str, int]]:
    """Computations that an instruction calls, and how often."""
    times = 1
    if " while(" in line:
        condition, body = (
            parts.get(re.search(rf"{name}=%?([\w.\-]+)", line)[1], "")
            for name in ("condition", "body")
        )
        known = re.findall(r"known_trip_count\D*(\d+)", line)
        limit = re.findall(CONSTANT.format(r"\S+"), condition)
        if known:
            times = int(known[0])
        elif len(limit) == 1:
            times = -(-int(limit[0]) // _stride(condition, body))
        else:
            times = turns
    for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
        yield called, times
    # Of a step's branches only one is work: parts are full or empty.
    for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
        for called in re.findall(r"[\w.\-]+", branches):
            yield called, times


def _stride(condition: str, body: str) -> int:
    """What a loop adds to its counter in a turn: more than 1 where it was unrolled."""
    counter = re.search(r" get-tuple-element\(.*?\), index=(\d+)", condition)
    root = re.search(r"ROOT .* tuple\((.*?)\)", body)
    if counter and root:
        name = re.findall(r"%[\w.\-]+", root[1])[int(counter[1])]
        added = re.search(rf"{re.escape(name)} = .* add\((%\S+), (%[\w.\-]+)\)", body)
        for operand in added.groups() if added else ():
            number = re.search(CONSTANT.format(re.escape(operand)), body)
            if number:
                return int(number[1])
    return 1


def _group(line: str) -> int:
    """Chips in a group: of [groups,n]<=[...], of the first list, of axes of a mesh."""
    found = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if found:
        return int(found[1])
    found = re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line)
    if found:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return found[1].count(",") + 1 if found else 2


def _on(tree: Tree, sharding: NamedSharding) -> Tree:
    """Shapes on a sharding."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


HEAD = """\
| program | GB a chip | TFLOP a chip: needed | + computed anew | collectives, GB a chip \
| bound by | estimated s | estimated MFU |
|---|---:|---:|---:|---:|---|---:|---:|"""


def line(row: dict[str, Any]) -> str:
    """A row of the Markdown table under HEAD."""
    needed, flops = (row[k] / 1e12 for k in ("needed_flops", "flops"))
    cells = [row["program"], f"{row['bytes'] / 1e9:.2f}"]
    cells[-1] += "" if row.get("fits", True) else " (too much)"
    cells += [f"{needed:.2f}", f"{flops - needed:.2f}"]
    cells.append(
        f"{row['collective_bytes'] / 1e9:.3f}" if "collective_bytes" in row else ""
    )
    if "seconds" in row:
        spans = [f"{t:.3f}" for t in row["step_seconds"]]
        mfu = [f"{m:.0%}" for m in reversed(row["mfu"])]
        cells += [max(row["seconds"], key=row["seconds"].get)]
        cells += ["-".join(spans), "-".join(mfu)]
    else:
        cells += [""] * 3
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> None:
    """Print the plan of a config, a line as soon as it is known."""
    flag = flags.FLAGS
    with aim_jax.command(argv):
        cfg = config.load(flag.config or "", flag.set)
        how = dataclasses.replace(cfg.parallel, mode="jit")
        # Nothing runs; and a compiler whose devices are looked for in vain is forgotten.
        jax.config.update("jax_platforms", "cpu")
        if flag.devices:
            jax.config.update("jax_num_cpu_devices", flag.devices)
            chip, devices = None, parallel.open_devices(how)
        else:
            chip, devices = describe(flag.topology, how)
        rows = plan(cfg, devices, chip, flag.length, flag.target, flag.program)
        if not flag.json:
            print(HEAD)
        for row in rows:
            print(json.dumps(row) if flag.json else line(row), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "Python file that assigns CONFIG.")
    flags.DEFINE_multi_string("set", [], "section.field=value; may be repeated.")
    flags.DEFINE_string(
        "topology", "v5e:2x2", "Kind of TPU and chips a side, or of GPU and how many."
    )
    flags.DEFINE_integer("devices", None, "As many CPU devices, in place of those.", 1)
    flags.DEFINE_integer("length", 512, "Tokens of a row, its answer included.", 2)
    flags.DEFINE_integer("target", 32, "Tokens of an answer.", 1)
    flags.DEFINE_multi_enum("program", PROGRAMS, PROGRAMS, "May be repeated.")
    flags.DEFINE_bool("json", False, "A line of JSON for each, in place of a table.")
    app.run(main)
