"""Every family against PyTorch, and what holds of the models whatever the weights."""

import dataclasses
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from fixtures import make_models
from jax.experimental.pallas import tpu

import aim_jax
from aim_jax import config, lora, methods, models, parallel, steps
from aim_jax.models import decoder, flash, hf, layers

NAMES = sorted(make_models.CONFIGS)
DECODERS = [n for n in NAMES if "t5" not in n]


@functools.cache
def case(name: str) -> parity.Case:
    folder = make_models.FOLDER / name
    return parity.open_case(folder, folder / "adapter")


@functools.cache
def recorded(name: str) -> parity.Arrays:
    with np.load(make_models.FOLDER / name / "expected.npz") as data:
        return dict(data)


def worse(found: dict[str, float]) -> dict[str, float]:
    return {name: v for name, v in found.items() if not v <= parity.BARS[name]}


def batch(name: str, k: int) -> dict[str, jax.Array]:
    """The first training batch with `k` target positions."""
    first = parity.batch(case(name), recorded(name), 0)
    leaves = {key: jnp.asarray(first[key][0]) for key in ("inputs", "mask")}
    return leaves | {"targets": jnp.zeros((len(leaves["mask"]), k), jnp.int32)}


@functools.cache
def forward(name: str):
    return jax.jit(case(name).base.model.apply)


def logits(name: str, leaves: dict[str, jax.Array]) -> np.ndarray:
    return np.asarray(forward(name)({"params": case(name).base.params}, leaves))


@pytest.mark.parametrize("name", NAMES)
def test_recorded(name):
    """Logits, loss, gradients, AdamW steps and greedy tokens as PyTorch's were."""
    assert not worse(parity.measure(case(name), recorded(name)))


# Recorded numbers hold every family every day, PyTorch itself one of each stack.
LIVE = ("t5", "llama3")


@pytest.mark.parametrize(
    "name",
    [n if n in LIVE else pytest.param(n, marks=pytest.mark.slow) for n in NAMES],
)
def test_live(name, tmp_path):
    """The same on other rows with the PyTorch that is installed, and what we export."""
    pytest.importorskip("peft")
    folder = make_models.FOLDER / name
    rows = make_models.rows(make_models.CONFIGS[name]["vocab_size"], seed=1)
    expected = make_models.record(folder, rows, folder / "adapter")
    found = parity.measure(case(name), expected)
    found |= parity.exports(case(name), expected, tmp_path)
    assert not worse(found)


@pytest.mark.parametrize("name", ["t5", "llama3", "gemma3"])
def test_bfloat16(name):
    """Rounded as much as PyTorch rounds; logits, loss, adapter and optimizer are float32."""
    folder = make_models.FOLDER / name
    ours, theirs = parity.rounding(folder, folder / "adapter", recorded(name))
    assert 1e-4 < ours < 1.5 * theirs
    cfg = config.Config(
        model=config.Model(path=str(folder), dtype="bfloat16"),
        lora=config.Lora(target=("all-linear",)),
    )
    base = hf.load(cfg.model)
    assert {x.dtype for x in jax.tree.leaves(base.params)} == {jnp.dtype(jnp.bfloat16)}
    few = batch(name, 3)
    shape = jax.eval_shape(base.model.apply, {"params": base.params}, few)
    assert shape.dtype == jnp.float32
    delta = lora.init(jax.random.key(0), base.params, base.keys, cfg.lora)
    state = steps.init(delta, 1, jax.random.key(0))
    few["weights"] = jnp.ones(few["targets"].shape)
    micro = jax.tree.map(lambda x: x[None], few)
    train = steps.make(base.model, cfg, methods.Method()).train
    after, measures = jax.eval_shape(train, base.params, state, (), micro)
    kept = (after.delta, after.adam.mu, after.adam.nu, measures)
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype(jnp.float32)}


@pytest.mark.skipif(
    "AIM_JAX_GEMMA" not in os.environ,
    reason="AIM_JAX_GEMMA does not point to a Gemma 3 270M directory",
)
def test_gemma_270m(tmp_path):
    """The real weights; their logits are an order of magnitude larger."""
    pytest.importorskip("peft")
    folder = pathlib.Path(os.environ["AIM_JAX_GEMMA"])
    expected = parity.gemma(folder, tmp_path / "adapter")
    opened = parity.open_case(folder, tmp_path / "adapter", parity.GEMMA_RATE)
    found = parity.measure(opened, expected)
    found |= parity.exports(opened, expected, tmp_path / "run")
    bars = parity.BARS | dict.fromkeys(("logits", "adapted", "peft", "merged"), 5e-4)
    assert not {n: v for n, v in found.items() if not v <= bars[n]}


@pytest.mark.parametrize("name", ["t5", "mistral", "gemma3"])
def test_a_row_alone(name):
    """Greedy tokens do not depend on what shares a batch, nor on padding."""
    alone = parity.decode(case(name), recorded(name), 1)
    assert (alone == recorded(name)["tokens"]).all()


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_logits_at_the_last_positions(name):
    """The last layer's work at the last positions alone changes no logit there."""
    length = batch(name, 1)["mask"].shape[1]
    everywhere = logits(name, batch(name, length))
    few = logits(name, batch(name, 3))
    assert few.shape[1] == 3
    # A row's padding has no meaningful logits.
    seen = np.asarray(batch(name, 1)["mask"])[:, -3:]
    np.testing.assert_allclose(few[seen], everywhere[:, -3:][seen], atol=2e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_padding_and_empty_rows(name):
    """More padding changes nothing; a row without any token stays finite."""
    leaves = batch(name, 3)
    padded = {
        "inputs": jnp.pad(leaves["inputs"], ((0, 1), (5, 0)), constant_values=7),
        "mask": jnp.pad(leaves["mask"], ((0, 1), (5, 0))),
        "targets": jnp.zeros((len(leaves["mask"]) + 1, 3), jnp.int32),
    }
    found = logits(name, padded)
    assert np.isfinite(found).all()
    seen = np.asarray(leaves["mask"])[:, -3:]
    np.testing.assert_allclose(found[:-1][seen], logits(name, leaves)[seen], atol=2e-5)


def test_window():
    """What lies beyond the windows of all layers has no say; what lies within has."""
    model = case("mistral").base.model
    window = model.config.kinds[0].window
    reach = (window - 1) * len(model.config.pattern)
    inputs = np.full((2, 16), 5, np.int32)
    leaves = {"mask": np.ones((2, 16), bool), "targets": np.zeros((2, 1), np.int32)}
    for distance, same in ((reach + 1, True), (reach, False)):
        changed = inputs.copy()
        changed[1, 15 - distance] = 9
        found = logits("mistral", {"inputs": changed, **leaves})
        assert (np.abs(found[0] - found[1]).max() < 1e-6) == same


@pytest.mark.parametrize(
    "name, remat", [("t5", "full"), ("t5", "dots"), ("gemma3", "dots")]
)
def test_remat(name, remat):
    """Recomputed layers give the same gradients, with the same elements dropped."""
    opened = case(name)
    kept, again = (
        hf.load(config.Model(path=opened.cfg.model.path, dropout=0.3, remat=remat))
        for remat in ("none", remat)
    )
    leaves = batch(name, 3)

    adapter = dataclasses.replace(opened.cfg.lora, dropout=0.5)

    def total(delta, model, rngs):
        low = lora.bind(delta, adapter, train=True)
        variables = {"params": opened.base.params, "lora": low}
        return jnp.square(model.apply(variables, leaves, rngs=rngs)).mean()

    gradient = jax.jit(jax.grad(total), static_argnums=1)

    def both(rngs):
        return (
            parity.flat(opened, gradient(opened.delta, opening.model, rngs))
            for opening in (kept, again)
        )

    ours, theirs = both({})
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)
    ours, theirs = both(_rngs())
    # Rounding, which differs between compilers by several of 1e-6.
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max()


def test_dropout():
    """Dropout of attention and adapter acts where a random key is given, only there."""
    opened = case("llama3")
    low = lora.bind(opened.delta, config.Lora(r=2, dropout=0.5), train=True)
    variables = {"params": opened.base.params, "lora": low}
    leaves = batch("llama3", 3)
    apply = jax.jit(opened.base.model.apply)
    plain = apply(variables, leaves)
    one, two = (apply(variables, leaves, rngs={"dropout": k}) for k in _keys())
    assert (apply(variables, leaves) == plain).all()
    assert not np.allclose(one, plain) and not np.allclose(one, two)
    del variables["lora"]
    attention = hf.load(config.Model(path=opened.cfg.model.path, dropout=0.5)).model
    apply = jax.jit(attention.apply)
    plain, dropped = (apply(variables, leaves, rngs=r) for r in ({}, _rngs()))
    assert np.allclose(plain, logits("llama3", leaves), atol=1e-5)
    assert not np.allclose(plain, dropped)


@pytest.mark.parametrize("platform", ["cuda", "default"])
def test_one_query_on_each_platform(monkeypatch, platform):
    """Keys and values repeated, or queries in groups: the same attention."""
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arrays, **ways: ways[platform](*arrays)
    )
    rng = np.random.default_rng(0)
    shapes = [(3, 8, 1, 16), (3, 2, 9, 16), (3, 2, 9, 16), (3, 1, 1, 9)]
    q, k, v, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    of_heads = (jnp.repeat(x, 4, axis=1) for x in (k, v))
    expected = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (q, *of_heads)), bias, scale=1.0
    )
    found = layers.attend(q, k, v, [bias])
    np.testing.assert_allclose(found, expected.swapaxes(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("product", [layers.project, layers.logits])
@pytest.mark.parametrize("rows", [layers.FEW, layers.FEW + 4])
def test_products_from_either_side(product, rows):
    """x W^T and its gradients, turned for few wide rows on a CPU and plain for more."""
    rng = np.random.default_rng(0)
    shapes = (4, rows // 4, layers.WIDE), (24, layers.WIDE), (4, rows // 4, 24)
    x, weight, target = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    found, turn = jax.vjp(jax.jit(product), x, weight)
    expected = (
        np.einsum("bti,oi->bto", x, weight),
        np.einsum("bto,oi->bti", target, weight),
        np.einsum("bto,bti->oi", target, x),
    )
    for ours, theirs in zip((found, *turn(target)), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)  # sums of 512
    text = jax.jit(product).lower(x, weight).as_text()
    assert ("optimization_barrier" in text) == (rows == layers.FEW)


@pytest.mark.parametrize("bias_shape", [(2, 1, 6, 7), (1, 4, 6, 7), (2, 1, 1, 7)])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gradients_of_attention(bias_shape, rate):
    """As those of the formula, of which nothing is told how to go backward."""
    rng = np.random.default_rng(0)
    kv_heads = 2 if bias_shape[1:3] == (1, 6) else 4
    shapes = [(2, 4, 6, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 8), bias_shape]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    target = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
    key = jax.random.key(0) if rate else None

    def formula(q, k, v, bias):
        k, v = (jnp.repeat(x, 4 // kv_heads, axis=1) for x in (k, v))
        weights = jax.nn.softmax(jnp.einsum("bhtd,bhsd->bhts", q, k) + bias)
        if rate:
            weights = layers.drop(weights, rate, key)
        return jnp.einsum("bhts,bhsd->bhtd", weights, v)

    def ours(q, k, v, bias):
        return layers.attend(q, k, v, [bias], rate, key)

    expected, found = (
        jax.value_and_grad(lambda *x, f=f: jnp.sum(target * f(*x)), (0, 1, 2, 3))(
            *arrays
        )
        for f in (formula, ours)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        expected,
        found,
    )


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    ("kv_heads", "biases"),
    [
        (4, [(1, 4, 64, None), (2, 1, 1, None)]),  # T5's encoder
        (4, [(2, 1, 1, None)]),
        (2, [(2, 1, None, 64)]),  # a decoder with grouped queries
    ],
)
@pytest.mark.parametrize(
    ("compiler", "many", "interpret"),
    [(flash.TRITON, 192, True), (flash.MOSAIC, 768, tpu.InterpretParams())],
)
def test_attention_in_tiles(compiler, many, interpret, kv_heads, biases, rate):
    """Output, gradients and dropped places are those of the formula, in several tiles."""
    rng = np.random.default_rng(0)
    t, s = (64, many) if biases[-1][3] is None else (many, 64)
    assert compiler.fits(t, s, 16) and compiler.block(many, 64) < many
    biases = [[many if n is None else n for n in shape] for shape in biases]
    shapes = [(2, 4, t, 16), *[(2, kv_heads, s, 16)] * 2, *biases]
    q, k, v, *biases = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    hidden = rng.random(biases[-1].shape) < 0.3
    biases[-1] = layers.mask_bias(jnp.asarray(~hidden))
    words = jnp.array([3, 5, 7], jnp.uint32)  # of the rows that begin at number 7
    key = jax.random.wrap_key_data(words, impl=layers.HASH) if rate else None

    def tiles(*qkv):
        kept = functools.partial(layers.kept, rate)
        dropout = words if rate else None, rate, kept
        return flash.attend(*qkv, biases, *dropout, compiler, interpret)

    def formula(*qkv):
        return layers.attend(*qkv, biases, rate, key)

    target = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
    found, expected = (
        jax.value_and_grad(lambda *x, f=f: jnp.sum(target * f(*x)), (0, 1, 2))(q, k, v)
        for f in (tiles, formula)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5),
        found,
        expected,
    )


def test_dropped_places_are_independent_of_key_and_neighbours():
    chain = jax.random.fold_in(jax.random.key(0, impl=layers.HASH), 1)
    keys = jax.random.split(chain, 300)
    kept = jax.jit(jax.vmap(lambda k: layers.drop(jnp.ones((32, 512)), 0.1, k)))(keys)
    assert set(np.unique(kept)) == {np.float32(0), np.float32(1 / 0.9)}
    kept = (np.asarray(kept).reshape(300, -1) > 0) - 0.9
    # Each mean in units of its standard error under independence: 5 is one in 1e6.
    sigma = 0.3
    assert abs(kept.mean()) < 5 * sigma / kept.size**0.5
    for pairs in (
        kept[1:] * kept[:-1],
        *(kept[:, step:] * kept[:, :-step] for step in (1, 2, 8, 32, 512)),
    ):
        assert abs(pairs.mean()) < 5 * sigma**2 / pairs.size**0.5
    assert (layers.drop(jnp.ones(9), 0.0, keys[0]) == 1).all()


def _keys():
    return jax.random.split(jax.random.key(0, impl=layers.HASH))


def _rngs():
    return {"dropout": _keys()[0]}


# How releases before transformers 5 wrote the same settings.
EARLIER = {
    "llama3": (
        ["rope_parameters"],
        {
            "rope_theta": 100.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama2": (["rope_parameters", "num_key_value_heads", "head_dim"], {}),
    "qwen2": (["rope_parameters", "layer_types"], {"rope_theta": 10000.0}),
    "gemma3": (
        ["rope_parameters", "layer_types", "_sliding_window_pattern"],
        {
            "rope_theta": 1000.0,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "sliding_window_pattern": 2,
        },
    ),
    "t5": (["tie_word_embeddings", "scale_decoder_outputs"], {}),
    "flan_t5": (["scale_decoder_outputs"], {"tie_word_embeddings": False}),
}


def settings(name: str) -> dict:
    return json.loads((make_models.FOLDER / name / "config.json").read_text())


@pytest.mark.parametrize("name", EARLIER)
def test_config_of_earlier_releases(name):
    gone, old = EARLIER[name]
    new = settings(name)
    family = models.family(new["model_type"])
    before = {k: v for k, v in new.items() if k not in gone} | old
    assert family.config_from_hf(before) == family.config_from_hf(new)


LINEAR = {"rope_type": "linear", "factor": 8.0}
NEAR = {"rope_type": "default", "rope_theta": 100.0}


@pytest.mark.parametrize(
    ("name", "change", "same"),
    [
        (
            "llama3",
            {"rope_scaling": LINEAR, "rope_theta": 50.0},
            {"rope_parameters": LINEAR | {"rope_theta": 50.0}},
        ),
        (
            "llama3",
            {"original_max_position_embeddings": 8},
            {
                "rope_parameters": make_models.LLAMA3
                | {"original_max_position_embeddings": 8}
            },
        ),
        (
            "gemma3",
            {"rope_scaling": LINEAR},
            {
                "rope_parameters": {
                    "full_attention": LINEAR | {"rope_theta": 1000.0},
                    "sliding_attention": NEAR,
                }
            },
        ),
    ],
)
def test_config_read_as_transformers_does(name, change, same):
    """Of what a config.json says twice, or not at all, the same counts."""
    family = models.family(settings(name)["model_type"])
    found = [family.config_from_hf(settings(name) | data) for data in (change, same)]
    assert found[0] == found[1] != family.config_from_hf(settings(name))


def test_windows_of_some_layers():
    """Mistral's layer_types say which (Ministral 8B); without them all layers have one."""
    data = settings("mistral")
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    found = models.family("mistral").config_from_hf(data | {"layer_types": kinds})
    assert [found.kinds[i].window for i in found.pattern] == [None, 4, None]
    found = models.family("mistral").config_from_hf(data)
    assert [found.kinds[i].window for i in found.pattern] == [4, 4, 4]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama3", {"model_type": "mamba"}, "'mamba'.*gemma3_text, llama, mistral"),
        ("llama3", {"rope_parameters": "linear"}, "not what transformers writes there"),
        ("t5", {"feed_forward_proj": None}, "not what transformers writes there"),
        ("llama3", {"attention_bias": True}, "attention_bias True"),
        ("llama3", {"mlp_bias": True}, "mlp_bias True"),
        ("llama3", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        (
            "llama3",
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor 0.5",
        ),
        ("llama3", {"hidden_act": "swish7"}, "activation 'swish7'.*silu"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("gemma3", {"text_config": {}, "model_type": "gemma3"}, "not text alone"),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}}, r"weights \(fp8\)"),
        ("t5", {"feed_forward_proj": "gated-swish"}, "gated-swish.*relu"),
        ("t5", {"d_kv": ...}, "no field 'd_kv'"),
        ("llama3", {"hidden_size": ...}, "no field 'hidden_size'"),
    ],
)
def test_unsupported_config(name, change, words, tmp_path):
    """What a family cannot do is refused by name, never ignored."""
    data = {k: v for k, v in (settings(name) | change).items() if v is not ...}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(aim_jax.InputError, match=words):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("attention", ["flash", "cudnn"])
def test_attention_is_judged_by_the_devices_that_run_it(attention):
    """A TPU has heads that a GPU has not; their bytes are counted before either is known."""
    model = config.Model(path=str(make_models.FOLDER / "gemma3"), attention=attention)
    assert hf.size(model) == hf.size(dataclasses.replace(model, attention="xla"))
    devices = parallel.open_devices(config.Parallel())
    with pytest.raises(aim_jax.InputError, match=f"attention: {attention} is for"):
        hf.build(model, devices)


LONG = {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("rope", "beside"),
    [
        ({"rope_type": "default", "rope_theta": 1e6}, {}),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}, {}),
        (make_models.LLAMA3 | LONG, {}),
        (make_models.LLAMA3, LONG),
        (make_models.LLAMA3 | {"rope_theta": 5e5, "factor": 32.0}, {}),
    ],
)
def test_frequencies(rope, beside):
    """Angles agree with transformers' to the last bit or the one before, at full size."""
    pytest.importorskip("torch")
    import transformers
    from transformers.models.llama import modeling_llama

    hf_config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=2, rope_parameters=dict(rope), **beside
    )
    theirs = modeling_llama.LlamaRotaryEmbedding(hf_config).inv_freq.numpy()
    settings = decoder.rope({"rope_parameters": rope, **beside})
    ours = np.array(decoder.frequencies(settings, 128), np.float32)
    np.testing.assert_allclose(ours, theirs, rtol=2.5e-7)


@pytest.mark.parametrize("name, bits", [("t5", 4), ("gemma3", 8)])
def test_quantized_base(name, bits):
    """Integers stand for every dense weight: rounded to half a scale, same model."""
    opened = case(name)
    path = opened.cfg.model.path
    small = hf.load(config.Model(path=path, dropout=0.0, bits=bits))
    whole, kept = hf.flatten(opened.base.params), hf.flatten(small.params)
    near = {}
    for module in lora.dense(small.keys):
        weight, scale = kept.pop(f"{module}/weight"), kept.pop(f"{module}/scale")
        assert weight.nbytes == whole[f"{module}/weight"].size * bits // 8
        again = layers.dequantize(weight, scale, jnp.float32)
        error = np.abs(again - whole[f"{module}/weight"])
        width = weight.shape[-1] // scale.shape[-1]
        assert (error <= 0.5001 * np.repeat(scale, width, -1)).all()
        near[f"{module}/weight"] = again
    assert not any(path.endswith("scale") for path in kept)
    few = batch(name, 3)
    expected = forward(name)({"params": hf.unflatten(kept | near)}, few)
    found = jax.jit(small.model.apply)({"params": small.params}, few)
    np.testing.assert_allclose(found, expected, atol=2e-5)
