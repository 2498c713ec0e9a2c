"""The delta: which layers have one, its arithmetic, and its way through PEFT's files."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures import make_models

import aim_jax
from aim_jax import config, lora
from aim_jax.models import hf


def abstract(name: str):
    """Family keys and parameter shapes of a model."""
    family, model_config = hf.read_config(make_models.FOLDER / name)
    return family.keys(model_config), hf.abstract(family.Model(model_config))


def modules(name: str, *target: str) -> list[str]:
    keys, _ = abstract(name)
    return sorted(lora.targets(keys, config.Lora(target=target)))


def random_delta(name: str, cfg: config.Lora):
    """Keys of the model and a delta without zeros."""
    keys, shapes = abstract(name)
    delta = lora.init(jax.random.key(0), shapes, keys, cfg)
    noise = jax.random.key(1)
    return keys, jax.tree.map(lambda x: x + jax.random.normal(noise, x.shape), delta)


def test_targets_by_name():
    assert modules("llama3", "q_proj", "down_proj") == [
        "last/attention/q",
        "last/mlp/down",
        "layers/attention/q",
        "layers/mlp/down",
    ]
    assert modules("t5", "q") == [
        "decoder/layers/attention/q",
        "decoder/layers/cross/q",
        "encoder/layers/attention/q",
    ]


def test_targets_by_pattern():
    assert modules("t5", r"decoder\..*\.(q|wo)") == [
        "decoder/layers/attention/q",
        "decoder/layers/cross/q",
        "decoder/layers/mlp/wo",
    ]
    assert modules("gemma3", r".*\.layers\.\d+\.mlp\.up_proj") == [
        "last/mlp/up",
        "layers/mlp/up",
    ]


def test_targets_of_all_dense_layers():
    kinds = ("attention/k", "attention/o", "attention/q", "attention/v")
    kinds += ("mlp/down", "mlp/gate", "mlp/up")
    stacks = ("last", "layers")
    assert modules("llama3", "all-linear") == [
        f"{s}/{k}" for s in stacks for k in kinds
    ]
    assert len(modules("flan_t5", "all-linear")) == 4 + 8 + 2 * 3


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        (
            "llama3",
            ("q", "v"),
            "no module 'q, v'; there are down_proj, gate_proj, k_proj",
        ),
        ("t5", ("q", "v_proj"), "no module 'v_proj'; there are k, o, q, v, wi, wo"),
        ("llama3", ("q_proj", "proj"), "no module 'proj'"),
        ("llama3", ("(q_proj",), "bad pattern"),
        ("llama3", (), "no module"),
        # Modules that have no delta must not get one that does nothing.
        ("llama3", ("lm_head",), "no module 'lm_head'"),
        ("t5", ("shared",), "no module 'shared'"),
        ("t5", ("relative_attention_bias",), "no module 'relative"),
        ("gemma3", ("input_layernorm",), "no module 'input_layernorm'"),
        ("t5", (r"encoder\.block\.[0-1]\..*\.q",), "some layers only"),
    ],
)
def test_targets_that_there_are_not(name, target, words):
    with pytest.raises(aim_jax.InputError, match=words.replace("(", r"\(")):
        modules(name, *target)


def test_scale():
    assert lora.scale(config.Lora(r=16, alpha=32.0)) == 2
    assert lora.scale(config.Lora(r=16, alpha=32.0, use_rslora=True)) == 8


def test_init():
    """A is uniform in +-1/sqrt(in), each layer its own; B is zero; float32."""
    keys, shapes = abstract("qwen3")
    cfg = config.Lora(r=64, target=("k_proj", "down_proj"))
    delta = hf.flatten(lora.init(jax.random.key(0), shapes, keys, cfg))
    assert delta["layers/mlp/down/a"].shape == (2, 64, 24)
    assert delta["layers/mlp/down/b"].shape == (2, 16, 64)
    assert delta["last/attention/k/a"].shape == (64, 16)
    for path, value in delta.items():
        assert value.dtype == jnp.float32
        if path.endswith("/b"):
            assert not value.any()
        else:
            bound = value.shape[-1] ** -0.5
            assert 0.99 * bound < jnp.abs(value).max() <= bound
            assert abs(value.std() / (bound / 3**0.5) - 1) < 0.05
    first, second = delta["layers/mlp/down/a"]
    assert not jnp.allclose(first, second)


@pytest.mark.parametrize("name", ["t5", "gemma3"])
def test_fold(name):
    """Folded into the weights the delta gives the same logits; no other weight moves."""
    base = hf.load(config.Model(path=str(make_models.FOLDER / name)))
    target = ("q", "wo") if name == "t5" else ("q_proj", "down_proj")
    cfg = config.Lora(r=2, alpha=3.0, target=target, use_rslora=True)
    _, delta = random_delta(name, cfg)
    delta = jax.tree.map(lambda x: 0.1 * x, delta)
    tokens = jnp.arange(3, 15).reshape(2, 6)
    batch = {"inputs": tokens, "mask": tokens > 0, "targets": tokens[:, :4]}
    folded = lora.fold(base.params, delta, cfg)
    apply = jax.jit(base.model.apply)
    bound = apply({"params": base.params, "lora": lora.bind(delta, cfg)}, batch)
    assert jnp.abs(apply({"params": folded}, batch) - bound).max() < 2e-5
    assert jnp.abs(apply({"params": base.params}, batch) - bound).max() > 1e-2
    flat = hf.flatten(folded)
    moved = {p for p, v in hf.flatten(base.params).items() if (v != flat[p]).any()}
    assert moved == {f"{p}/weight" for p in lora.targets(base.keys, cfg)}


def test_bind_carries_dropout_only_to_training():
    cfg = config.Lora(r=2, alpha=8.0, dropout=0.3, target=("q_proj",))
    _, delta = random_delta("llama3", cfg)
    bound = hf.flatten(lora.bind(delta, cfg))
    assert {p.rpartition("/")[2] for p in bound} == {"a", "b"}
    assert jnp.allclose(
        bound["last/attention/q/b"], 4 * delta["last"]["attention"]["q"]["b"]
    )
    bound = hf.flatten(lora.bind(delta, cfg, train=True))
    assert bound["layers/attention/q/rate"].shape == (2,)
    assert jnp.allclose(bound["last/attention/q/rate"], 0.3)


@pytest.mark.parametrize("name", make_models.CONFIGS)
def test_files_are_named_as_peft_names_them(name, tmp_path):
    """An adapter that PEFT wrote goes in and comes out with the same tensors."""
    folder = make_models.FOLDER / name / "adapter"
    keys, shapes = abstract(name)
    delta, cfg = hf.load_adapter(folder, shapes, keys)
    hf.save_adapter(tmp_path, delta, keys, cfg, "somewhere")
    file = "adapter_model.safetensors"
    theirs = safetensors.numpy.load_file(folder / file)
    ours = safetensors.numpy.load_file(tmp_path / file)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value)
    written, read = (
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, folder)
    )
    read["base_model_name_or_path"] = "somewhere"
    assert written == {field: read[field] for field in written}


@pytest.mark.parametrize(
    "cfg",
    [
        config.Lora(r=3, alpha=7.5, dropout=0.0, target=("v_proj",), use_rslora=True),
        config.Lora(target=(r".*\.(q|gate)_proj",)),
        config.Lora(target=("all-linear",)),
    ],
)
def test_round_trip(cfg, tmp_path):
    keys, delta = random_delta("qwen2", cfg)
    hf.save_adapter(tmp_path, delta, keys, cfg, "somewhere")
    again, read = hf.load_adapter(tmp_path, abstract("qwen2")[1], keys)
    assert read == cfg
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), delta, again))


@pytest.fixture
def adapter(tmp_path) -> pathlib.Path:
    """A copy of Qwen3's adapter."""
    return shutil.copytree(make_models.FOLDER / "qwen3" / "adapter", tmp_path / "a")


def load(folder: pathlib.Path):
    keys, shapes = abstract("qwen3")
    return hf.load_adapter(folder, shapes, keys)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("bias", "lora_only"),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["k_proj"]),
        ("init_lora_weights", "pissa"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("some_field_of_next_year", {"a": 1}),
        ("peft_type", "IA3"),
        ("lora_alpha", 0),
        ("lora_alpha", "x"),
        ("target_modules", 5),
        ("r", "x"),
    ],
)
def test_adapters_that_a_delta_cannot_hold(adapter, field, value):
    """Whatever PEFT can express and a delta cannot is refused by name."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(aim_jax.InputError, match=f"{field}|not what PEFT writes"):
        load(adapter)


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({NAME.format("A"): None}, "missing: " + NAME.format("A")),
        ({NAME.format("C"): np.ones(3)}, "unknown: " + NAME.format("C")),
        ({NAME.format("A"): np.ones((2, 5))}, r"misshapen: .*\(2, 5\), not \(2, 16\)"),
        (
            {NAME.format("B"): np.full((24, 2), np.nan)},
            "not finite in " + NAME.format("B"),
        ),
    ],
)
def test_tensors_that_do_not_fit(adapter, change, words):
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file) | change
    safetensors.numpy.save_file(
        {k: v for k, v in tensors.items() if v is not None}, file
    )
    with pytest.raises(aim_jax.InputError, match=words):
        load(adapter)


def test_files_that_are_not_there(adapter):
    file = adapter / "adapter_model.safetensors"
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(aim_jax.InputError, match="adapter_model.bin is a pickle"):
        load(adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(aim_jax.InputError, match="adapter_config.json: No such file"):
        load(adapter)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("flan_t5", r".*\.(k|wi_1)"),
        ("gemma3", r".*\.(k|gate)_proj"),
        ("qwen2", "all-linear"),
        ("flan_t5", "all-linear"),
    ],
)
def test_peft_scales_alike(name, target, tmp_path):
    """Rank-stabilised scale, targets and a new rank mean the same there."""
    peft = pytest.importorskip("peft")
    t5 = "t5" in name
    cfg = config.Lora(r=3, alpha=5.0, target=(target,), use_rslora=True)
    keys, delta = random_delta(name, cfg)
    delta = jax.tree.map(lambda x: 0.1 * x, delta)
    folder = make_models.FOLDER / name
    hf.save_adapter(tmp_path, delta, keys, cfg, str(folder))
    theirs = peft.PeftModel.from_pretrained(make_models.load(folder), str(tmp_path))
    rows = [([5, 6, 7], [8, 9, 10])]
    expected = make_models.answer_logits(theirs.eval(), make_models.pack(rows, t5))
    base = hf.load(config.Model(path=str(folder)))
    inputs = jnp.array([rows[0][0] if t5 else rows[0][0] + rows[0][1][:-1]])
    batch = {"inputs": inputs, "mask": inputs > 0, "targets": jnp.array([rows[0][1]])}
    bound = {"params": base.params, "lora": lora.bind(delta, cfg)}
    assert jnp.abs(jax.jit(base.model.apply)(bound, batch)[0] - expected).max() < 2e-5
