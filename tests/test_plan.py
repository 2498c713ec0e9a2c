"""The plan counts what a hand counts, and its command works where no TPU compiler is."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from fixtures import make_models

from aim_jax import config, parallel, plan
from aim_jax.models import hf

ROOT = pathlib.Path(__file__).parents[1]
LLAMA = make_models.FOLDER / "llama2"

HLO = """HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(f32[] %x, f32[] %y)
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]) parameter(0)
  %w = bf16[8,4]{1,0} all-gather(bf16[2,4]{1,0} %q), replica_groups=[2,4]<=[8], dimensions={0}
  %old = s32[] get-tuple-element(%p), index=0
  %two = s32[]{:T(128)} constant(2)
  %new = s32[] add(%old, STRIDE)
  ROOT %out = (s32[], bf16[8,4]) tuple(%new, %w)
}

%first (a: f32[16]) -> f32[16] {
  ROOT %x = f32[16] all-reduce(f32[16] %a), channel_id=7, replica_groups={{0,1},{2,3}}
}

%second (a: f32[16]) -> f32[16] {
  ROOT %y = f32[16] all-reduce(f32[16] %a), channel_id=7, replica_groups={{0,1},{2,3}}
}

%condition (p: (s32[], bf16[8,4])) -> pred[] {
  LIMIT
  %p = (s32[], bf16[8,4]) parameter(0)
  %counter = s32[] get-tuple-element(%p), index=0
}

%skip (a: f32[16]) -> f32[16] {
  ROOT %same = f32[16] parameter(0)
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %a = f32[16] parameter(0)
  %half = f32[16] conditional(s32[] %i, f32[16] %a, f32[16] %a), branch_computations={%skip, %first}
  %other = f32[16] fusion(f32[16] %a), kind=kCustom, calls=%second
  %loop = (s32[], bf16[8,4]) while((s32[], bf16[8,4]) %t), condition=%condition, body=%body, KNOWN
  ROOT %r = f32[16] all-reduce(f32[16] %a), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


@pytest.mark.parametrize(
    "known, limit, stride, times",
    [
        ('backend_config={"known_trip_count":{"n":"3"}}', "", "%two", 3),
        ("", "%n = s32[]{:T(128)} constant(4)", "%other", 4),
        ("", "%n = u32[]{:T(128)} constant(7)", "%two", 4),
        ("", "", "%two", 5),
    ],
)
@pytest.mark.parametrize("group", ["{{0,1},{2,3}}", "mesh['a'=4,'b'=2] {'b'}"])
def test_bytes_of_collectives(known, limit, stride, times, group):
    text = HLO.replace("KNOWN", known).replace("LIMIT", limit).replace("STRIDE", stride)
    text = text.replace("{{0,1},{2,3}}", group)
    found = plan.collective_bytes(text, turns=5)
    gathered = 8 * 4 * 2 * 3 / 4
    reduced = 16 * 4 * 2 * 1 / 2
    # One of the entry, and one of two fusions.
    assert found == times * gathered + 2 * reduced


def test_bytes_of_arrays():
    text = "(pred[3], bf16[2,4]{1,0:T(8,128)(2,1)}, f64[2], u32[], s4[6])"
    assert plan._sizes(text) == [3, 16, 16, 4, 3]


KERNELS = """HloModule step

%of_a_layer (w: bf16[3,8,4], i: s32[]) -> bf16[8,4] {
  %w = bf16[3,8,4]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %slice = bf16[1,8,4]{2,1,0} dynamic-slice(%w, %i, %i), dynamic_slice_sizes={1,8,4}
  ROOT %layer = bf16[8,4]{1,0} bitcast(%slice)
}

%kept (all: f32[3,16], new: f32[16], i: s32[]) -> (f32[3,16], f32[16]) {
  %all = f32[3,16]{1,0} parameter(0)
  %new = f32[16]{0} parameter(1)
  %i.1 = s32[] parameter(2)
  %row = f32[1,16]{1,0} bitcast(%new)
  %put = f32[3,16]{1,0} dynamic-update-slice(%all, %row, %i.1, %i.1)
  %twice = f32[16]{0} add(%new, %new)
  ROOT %both = (f32[3,16]{1,0}, f32[16]{0}) tuple(%put, %twice)
}

%body (p: (bf16[3,8,4], f32[3,16], f32[16])) -> (bf16[3,8,4], f32[3,16], f32[16]) {
  %p = (bf16[3,8,4]{2,1,0}, f32[3,16]{1,0}, f32[16]{0}, s32[]) parameter(0)
  %w.1 = bf16[3,8,4]{2,1,0} get-tuple-element(%p), index=0
  %all.1 = f32[3,16]{1,0} get-tuple-element(%p), index=1
  %x = f32[16]{0} get-tuple-element(%p), index=2
  %i.2 = s32[] get-tuple-element(%p), index=3
  %layer.1 = bf16[8,4]{1,0} fusion(%w.1, %i.2), kind=kLoop, calls=%of_a_layer
  %made = (f32[16]{0}, s8[4096]{0}) custom-call(%x, %layer.1), custom_call_target="__cublas$lt$matmul"
  %y = f32[16]{0} get-tuple-element(%made), index=0
  %stored = (f32[3,16]{1,0}, f32[16]{0}) fusion(%all.1, %y, %i.2), kind=kLoop, calls=%kept
  ROOT %next = (bf16[3,8,4]{2,1,0}, f32[3,16]{1,0}, f32[16]{0}, s32[]) tuple(%w.1, %all.1, %y, %i.2)
}

%condition (p: f32[]) -> pred[] {
  ROOT %p.1 = pred[] parameter(0)
}

ENTRY %main (t: f32[16]) -> f32[16] {
  %t = f32[16]{0} parameter(0)
  %loop = (f32[16]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %copy = f32[16]{0} copy(%t)
}
"""


# As newer compilers have it: slices that other kernels do not wait for.
ASYNC = KERNELS.replace(
    "%layer.1 = bf16[8,4]{1,0} fusion(%w.1, %i.2), kind",
    """%start = ((bf16[3,8,4]{2,1,0}, s32[]), bf16[8,4]{1,0}, u32[]) fusion-start(%w.1, %i.2), kind""",
).replace("  %made =", "  %layer.1 = bf16[8,4]{1,0} fusion-done(%start)\n  %made =")


@pytest.mark.parametrize("text", [KERNELS, ASYNC], ids=["kernels", "async"])
def test_bytes_that_kernels_move(text):
    index, layer, vector = 4, 8 * 4 * 2, 16 * 4
    sliced = index + layer + layer
    product = vector + layer + vector
    kept = index + vector + vector + vector
    assert plan.moved_bytes(text) == 3 * (sliced + product + kept) + 2 * vector


def test_flops_of_a_forward_pass():
    """Twice every dense weight a token, and 4 S d a token and layer for attention."""
    family, model = hf.build(config.Model(path=str(LLAMA)))
    shapes = hf.flatten(hf.abstract(model))
    rows, length, target = 2, 16, 16
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {
        "inputs": ids,
        "mask": jax.ShapeDtypeStruct((rows, length), bool),
        "targets": jax.ShapeDtypeStruct((rows, target), jnp.int32),
    }
    params = hf.unflatten(shapes)
    traced = jax.make_jaxpr(lambda p, b: model.apply({"params": p}, b))(params, batch)
    work = plan.counted(traced.jaxpr)

    data = json.loads((LLAMA / "config.json").read_text())
    dense = sum(
        x.size
        for path, x in shapes.items()
        if "norm" not in path and path != "embed/weight"
    )
    width = data["num_attention_heads"] * data["head_dim"]
    attention = 4 * length * width * data["num_hidden_layers"]
    assert work.weight_flops == 2 * dense * rows * length
    assert work.other_flops == attention * rows * length
    assert work.trained == 2 * work.weight_flops + 3 * work.other_flops


def test_a_loop_counts_its_turns():
    x = jnp.ones((4, 4))

    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=7)[0]

    def endless(x):
        return jax.lax.while_loop(lambda c: c.sum() < 0, lambda c: c @ x, x)

    once = 2 * 4**3
    assert plan.counted(jax.make_jaxpr(scanned)(x).jaxpr).flops == 7 * once
    assert plan.counted(jax.make_jaxpr(endless)(x).jaxpr, 5).flops == 5 * once


SMALL = (
    "--config=configs/quickstart.py",
    f"--set=model.path={LLAMA}",
    "--set=lora.target=q_proj,v_proj",
    "--length=16",
    "--target=4",
)


def test_command_on_cpu_devices(command):
    done = command("plan", *SMALL, "--devices=2", "--program=probe", "--json")
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["program"] == "probe"
    assert row["bytes"] > row["argument_bytes"] > 0
    assert row["flops"] == row["needed_flops"] > 0
    # What crosses devices are the split weights, whatever the rows hold.
    longer = command(
        "plan", *SMALL, "--devices=2", "--program=probe", "--json", "--length=64"
    )
    moved = json.loads(longer.stdout)["collective_bytes"]
    assert moved == row["collective_bytes"] > 0


@pytest.mark.parametrize("remat, more", [("none", 0), ("dots", 0), ("full", 0.4)])
def test_what_a_train_step_needs_and_computes_anew(remat, more):
    """Of a step of 4 N, a forward pass runs again where layers are recomputed.

    That is 2 N but for each layer's last product, which backward does not ask for.
    """
    cfg = config.load(
        "configs/quickstart.py",
        [f.removeprefix("--set=") for f in SMALL if "--set=" in f]
        + [f"model.remat={remat}", "lora.r=1"],  # a small part of so small a model
    )
    devices = parallel.open_devices(config.Parallel(mode="jit"))
    made = plan.programs(cfg, devices, 16, 4)["train"]()
    work = plan.counted(jax.make_jaxpr(made.function)(*made.arguments).jaxpr)
    assert work.flops / made.needed - 1 == pytest.approx(more, abs=0.1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v9:2x2"], "--topology v9:2x2: the kinds are v5e, v5p, v6e, a100"),
        (
            [SMALL[1], "--devices=2", "--set=model.attention=cudnn"],
            "model.attention: cudnn is for decoders without attention dropout",
        ),
        (
            [*SMALL, "--devices=2", "--set=model.attention=flash"],
            "model.attention: flash is for NVIDIA GPUs",
        ),
        (["--devices=3"], "16 rows at once are no multiple of the 3 groups"),
        (["--devices=1", "--length=16"], "--length 16: a row has its answer in it"),
    ],
)
def test_bad_input_is_one_line(command, flags, message):
    done = command("plan", "--config=configs/quickstart.py", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


@pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda12_plugin"),
    reason="the GPU compiler is not installed (pip install 'jax[cuda12]')",
)
def test_gpus_that_need_not_be_there(command):
    """No attention keeps scores, a fused one moves none; eight GPUs share a base.

    Decoding reads a layer's keys and values where they lie.
    """

    def planned(program, topology, attention="xla", shape="qwen3_1p7b", length=512):
        done = command(
            "plan",
            f"--config=configs/{shape}.py",
            f"--set=model.path=configs/shapes/{shape}",
            "--set=model.dtype=bfloat16",
            f"--set=model.attention={attention}",
            f"--topology={topology}",
            f"--length={length}",
            f"--program={program}",
            "--json",
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    train = functools.partial(planned, "train")

    def moves_less(fused, plain):
        assert fused["needed_flops"] == pytest.approx(plain["needed_flops"], rel=1e-6)
        assert fused["bytes"] <= plain["bytes"]
        assert fused["seconds"]["memory"] < 0.8 * plain["seconds"]["memory"]

    plain, eight = train("h100:1"), train("h100:8")
    assert plain["bytes"] < 22e9  # 25.8e9 where scores were kept
    moves_less(train("h100:1", "cudnn"), plain)
    moves_less(train("h100:1", "flash"), plain)
    t5 = {"shape": "t5_large", "length": 544}  # 512 and an answer
    one, two = train("h100:1", "flash", **t5), train("h100:2", "flash", **t5)
    moves_less(one, train("h100:1", **t5))
    assert one["flops"] == pytest.approx(2 * two["flops"], rel=1e-6)
    assert 7 < plain["needed_flops"] / eight["needed_flops"] <= 8
    assert eight["collective_bytes"] > plain["collective_bytes"] == 0
    assert planned("decode", "h100:1")["moved_bytes"] < 0.9e12  # 1.1e12 with copies


@pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"),
    reason="the TPU compiler is not installed (pip install 'jax[tpu]')",
)
@pytest.mark.parametrize("tensor", [1, 4])
def test_tpus_that_need_not_be_there(command, tensor):
    """Attention in tiles, of which no score is counted, compiles by Mosaic."""

    def train(attention):
        done = command(
            "plan",
            "--config=configs/t5_large.py",
            "--set=model.path=configs/shapes/t5_small",
            "--set=model.dtype=bfloat16",
            f"--set=model.attention={attention}",
            f"--set=parallel.tensor={tensor}",
            "--topology=v5e:2x2",
            "--length=288",  # 256 and an answer
            "--program=train",
            "--json",
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    fused = train("flash")
    assert fused["fits"]
    if tensor == 1:  # else each chip computes all heads
        assert fused["moved_bytes"] < 0.9 * train("xla")["moved_bytes"]


def test_every_shape_of_the_table_is_a_model():
    folders = [p.parent for p in ROOT.glob("configs/shapes/*/config.json")]
    assert folders
    for folder in folders:
        hf.build(config.Model(path=str(folder)))
