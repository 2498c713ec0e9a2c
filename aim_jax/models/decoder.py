"""The decoder-only stack; `llama`, `qwen3` and `gemma3` are its families.

A family is a Config: RoPE and windows by kind of layer, norms, biases and scales are data.
All layers but the last are one scan. The last one stands beside it (`last` in the tree),
because its queries, output projection and MLP are wanted at the last positions only.
Names and numerics as Hugging Face's *ForCausalLM; softmax, norms, RoPE in float32.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import aim_jax
from aim_jax.models import layers

KIND = "decoder"
EMBEDDING = "embed/weight"
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
# How FSDP (`data`) and tensor parallelism split the weights (out, in): a layer's first
# products by output, its last ones by input, so that only their sums cross devices.
RULES = (
    (r"(embed|head)/weight", P("tensor", "data")),
    (r".*/(q|k|v|gate|up)/weight", P("tensor", "data")),
    (r".*/(o|down)/weight", P("data", "tensor")),
)
# Constants that early Llama checkpoints stored.
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

Cache = dict[str, Any]
KeyValues = layers.KeyValues


class Kind(NamedTuple):
    """A kind of layer: angle per position of each feature pair, and how far it looks."""

    frequencies: tuple[float, ...]
    window: int | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and numerics of a decoder.

    pattern: number in `kinds` of each layer; sandwich: norms after attention and MLP too;
    norm_offset: see `layers.RMSNorm`; query_scale multiplies the attention scores.
    """

    vocab: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    kinds: tuple[Kind, ...]
    pattern: tuple[int, ...]
    eps: float
    activation: str
    tied: bool
    query_scale: float
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    dropout: float = 0.0  # of the attention weights
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"


def config_from_hf(
    hf: dict[str, Any],
    kinds: tuple[Kind, ...],
    pattern: tuple[int, ...],
    refused: dict[str, tuple[Any, ...]],
    **family: Any,
) -> Config:
    """Config of a parsed config.json, whose fields all families name alike.

    refused: fields -> values that are supported. Raises InputError for any other.
    """
    for field, allowed in refused.items():
        if hf.get(field, allowed[0]) not in allowed:
            raise aim_jax.InputError(
                f"config.json: {field} {hf[field]!r} is not supported; it must be"
                f" {' or '.join(map(repr, allowed))}"
            )
    activation = hf.get("hidden_activation") or hf["hidden_act"]
    if activation not in layers.ACTIVATIONS:
        raise aim_jax.InputError(
            f"config.json: activation '{activation}' is not supported; supported are"
            f" {', '.join(layers.ACTIVATIONS)}"
        )
    width = head_width(hf)
    config = Config(
        vocab=hf["vocab_size"],
        width=hf["hidden_size"],
        heads=hf["num_attention_heads"],
        kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_width=width,
        mlp=hf["intermediate_size"],
        kinds=kinds,
        pattern=pattern,
        eps=hf["rms_norm_eps"],
        activation=activation,
        tied=hf.get("tie_word_embeddings", False),
        query_scale=width**-0.5,
        dropout=hf.get("attention_dropout") or 0.0,
    )
    return dataclasses.replace(config, **family)


def head_width(hf: dict[str, Any]) -> int:
    """Features of one head."""
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def used(
    kinds: dict[str, Kind], names: Sequence[str]
) -> tuple[tuple[Kind, ...], tuple[int, ...]]:
    """The kinds that occur among the `layer_types` of the layers, and their numbers."""
    unknown = sorted(set(names) - set(kinds))
    if unknown:
        raise aim_jax.InputError(
            f"config.json: layer_types {', '.join(unknown)} are not supported; supported"
            f" are {', '.join(kinds)}"
        )
    found = list(dict.fromkeys(kinds[name] for name in names))
    return tuple(found), tuple(found.index(kinds[name]) for name in names)


def rope(hf: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings of a config.json, as transformers 5 or as earlier releases write.

    Where there are both, the earlier name counts, as in transformers, and so does the
    original length that stands beside them.
    """
    settings = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    length = "original_max_position_embeddings"
    return {
        "rope_theta": hf.get("rope_theta", 1e4),
        length: hf.get("max_position_embeddings"),
        **settings,
        **{k: v for k, v in hf.items() if k == length},
    }


def frequencies(settings: dict[str, Any], width: int) -> tuple[float, ...]:
    """Angle per position of each of `width` / 2 feature pairs, float32 values.

    Types: default (Su et al. 2021), linear (positions divided by a factor) and llama3
    (low frequencies divided, with a smooth passage). Raises InputError for others.
    """
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise aim_jax.InputError(
            f"config.json: rope_type '{kind}' is not supported; supported are default,"
            " linear, llama3"
        )
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise aim_jax.InputError(
            "config.json: partial_rotary_factor"
            f" {settings['partial_rotary_factor']} is not supported; it must be 1"
        )
    # Rounded to float32 where PyTorch rounds: at position 1000 an angle shows it.
    power = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    found = 1 / (settings["rope_theta"] ** power.astype(float)).astype(np.float32)
    if kind == "linear":
        found = found / np.float32(settings["factor"])
    if kind == "llama3":
        low, high = settings["low_freq_factor"], settings["high_freq_factor"]
        turns = settings["original_max_position_embeddings"] * found / (2 * np.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        found = (1 - smooth) * found / settings["factor"] + smooth * found
    return tuple(float(f) for f in found.astype(np.float32))


def keys(config: Config) -> dict[str, str]:
    """Path of each parameter -> its Hugging Face name with `{}` for the layer number."""
    modules = {f"attention/{n}/weight": f"self_attn.{n}_proj.weight" for n in "qkvo"}
    if config.qkv_bias:
        modules |= {f"attention/{n}/bias": f"self_attn.{n}_proj.bias" for n in "qkv"}
    names = ["mlp/gate", "mlp/up", "mlp/down"]
    modules |= {f"{n}/weight": f"{n.replace('/', '.')}_proj.weight" for n in names}
    norms = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    if config.sandwich:
        norms |= {
            "attention_out_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm:
        norms |= {f"attention/{n}_norm": f"self_attn.{n}_norm" for n in "qk"}
    modules |= {f"{ours}/weight": f"{theirs}.weight" for ours, theirs in norms.items()}
    table = {
        "embed/weight": "model.embed_tokens.weight",
        "norm/weight": "model.norm.weight",
    }
    if not config.tied:
        table["head/weight"] = "lm_head.weight"
    last = len(config.pattern) - 1
    places = {"last": str(last)} | ({"layers": "{}"} if last else {})
    for place, number in places.items():
        for ours, theirs in modules.items():
            table[f"{place}/{ours}"] = f"model.layers.{number}.{theirs}"
    return table


class Tables(NamedTuple):
    """What all layers of a kind share, float32; the kinds are on axis 0.

    cos, sin: (kinds, b, 1, t, d/2); bias: (kinds, b, 1, t, s).
    """

    cos: jax.Array
    sin: jax.Array
    bias: jax.Array


def tables(
    kinds: tuple[Kind, ...], positions: jax.Array, back: jax.Array, mask: jax.Array
) -> Tables:
    """Tables of queries at `positions` (b, t).

    back (b or 1, t, s): how far before the query each key is, below 0 after it; mask: keys
    (b, s) that may be seen at all.
    """
    turns = np.array([k.frequencies for k in kinds], np.float32)
    angles = positions[:, None, :, None] * turns[:, None, None, None]
    back = back[:, None]
    visible = mask[:, None, None] & (back >= 0)
    biases = [
        visible if k.window is None else visible & (back < k.window) for k in kinds
    ]
    return Tables(jnp.cos(angles), jnp.sin(angles), layers.mask_bias(jnp.stack(biases)))


def rotate(x_bhtd: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x with its feature pairs (d, d + width/2) turned; float32 (Su et al. 2021)."""
    first, second = jnp.split(x_bhtd.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )


class Attention(nn.Module):
    """Causal attention; grouped queries, RoPE, optional norms of queries and keys."""

    config: Config
    keep: int

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: KeyValues | None, place: jax.Array, own: Tables
    ) -> tuple[jax.Array, KeyValues]:
        """Output at the last `keep` positions, and the new keys and values (b, k, t, d).

        With a `cache` those in it are seen too; the new ones take their `place` there.
        """
        c = self.config

        def dense(name: str, features: int, bias: bool) -> layers.Dense:
            return layers.Dense(features, bias, c.dtype, name=name)

        def heads(name: str, x: jax.Array, count: int) -> jax.Array:
            y = dense(name, count * c.head_width, c.qkv_bias)(x)
            y = layers.split_heads(y, count)
            if c.qk_norm and name != "v":
                y = layers.RMSNorm(c.eps, c.norm_offset, name=f"{name}_norm")(y)
            return y

        last = jax.tree.map(lambda t: t[..., -self.keep :, :], own)
        q_bhtd = rotate(heads("q", x[:, -self.keep :], c.heads), last.cos, last.sin)
        q_bhtd = (q_bhtd * c.query_scale).astype(c.dtype)
        k_bksd = rotate(heads("k", x, c.kv_heads), own.cos, own.sin).astype(c.dtype)
        new = k_bksd, heads("v", x, c.kv_heads)
        seen = new if cache is None else layers.put(cache, new, place)
        key = layers.Dropout(c.dropout).key()
        out = layers.attend(q_bhtd, *seen, [last.bias], c.dropout, key, c.attention)
        return dense("o", c.width, False)(layers.merge_heads(out)), new


class MLP(nn.Module):
    """Gated feed-forward block."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def dense(name: str, features: int) -> layers.Dense:
            return layers.Dense(features, dtype=c.dtype, name=name)

        h = layers.ACTIVATIONS[c.activation](dense("gate", c.mlp)(x))
        return dense("down", c.width)(h * dense("up", c.mlp)(x))


class Layer(nn.Module):
    """One block: (x, (kind, cache)) -> (x at the last `keep` positions, new keys, values).

    Without `caching` these do not go out.
    """

    config: Config
    keep: int
    caching: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        own: tuple[jax.Array, KeyValues | None],
        place: jax.Array,
        shared: Tables,
    ) -> tuple[jax.Array, KeyValues | None]:
        c = self.config
        kind, cache = own

        def norm(name: str, x: jax.Array) -> jax.Array:
            return layers.RMSNorm(c.eps, c.norm_offset, name=name)(x)

        h, new = Attention(c, self.keep, name="attention")(
            norm("attention_norm", x),
            cache,
            place,
            jax.tree.map(lambda t: t[0 if len(c.kinds) == 1 else kind], shared),
        )
        x = x[:, -self.keep :] + (norm("attention_out_norm", h) if c.sandwich else h)
        h = MLP(c, name="mlp")(norm("mlp_norm", x))
        x = x + (norm("mlp_out_norm", h) if c.sandwich else h)
        return layers.by_rows(x), new if self.caching else None


class Model(nn.Module):
    """A decoder-only language model; rows are right-aligned."""

    config: Config

    @nn.compact
    def _advance(
        self,
        tokens: jax.Array,
        shared: Tables,
        keep: int,
        cache: Cache | None = None,
        place: jax.Array | int = 0,
        caching: bool = False,
    ) -> tuple[jax.Array, Cache]:
        """Float32 logits of the last `keep` tokens (b, t), and the new keys and values."""
        c = self.config
        kept = cache or {}
        embed = layers.Embed(c.vocab, c.width, c.dtype, name="embed")
        # The scale is rounded to the compute type, as the checkpoint was trained.
        x = embed(tokens) * jnp.asarray(c.embed_scale, c.dtype)
        *pattern, last = c.pattern
        new = {}
        if pattern:
            scanned = layers.stack(Layer, len(pattern), 2, c.remat)
            x, new["layers"] = scanned(c, tokens.shape[1], caching, name="layers")(
                x, (jnp.array(pattern), kept.get("layers")), place, shared
            )
        x, new["last"] = Layer(c, keep, caching, name="last")(
            x, (last, kept.get("last")), place, shared
        )
        x = layers.RMSNorm(c.eps, c.norm_offset, name="norm")(x)
        head = embed if c.tied else layers.Embed(c.vocab, c.width, c.dtype, name="head")
        return head.attend(x), new

    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Float32 logits (b, k, v) at the last k positions, those of `targets`."""
        keep = batch["targets"].shape[1]
        shared = self._whole(batch["mask"], batch.get("segments"))
        return self._advance(batch["inputs"], shared, keep)[0]

    def real(self, path: str, batch: dict[str, jax.Array]) -> jax.Array:
        """Where the positions that the module at `path` runs over are tokens (b, t)."""
        return batch["mask"]

    def prefill(
        self, batch: dict[str, jax.Array], length: int, index: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache]:
        """Float32 logits (b, v) of the first token, and a cache for `length` tokens."""
        mask = batch["mask"]
        shared = self._whole(mask)
        logits, new = self._advance(batch["inputs"], shared, 1, caching=True)
        cache = {
            **jax.tree.map(lambda kv: layers.widen(kv, 0, -2, length), new),
            "mask": mask,
            "written": jnp.zeros(len(mask), jnp.int32),
            "index": jnp.asarray(index, jnp.int32),
        }
        return logits[:, 0], cache

    def step(self, token: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Float32 logits (b, v) of the token after `token` (b,), and the new cache."""
        mask, written, index = (cache[name] for name in ("mask", "written", "index"))
        prompt = mask.shape[1]
        length = cache["last"][0].shape[2] - prompt
        ago, own = layers.age(index, length, written)
        # The prompt lies before the ring, and ends where the row's own tokens begin.
        before = written[:, None] + jnp.arange(prompt, 0, -1)
        back = jnp.concatenate([before, jnp.broadcast_to(ago, own.shape)], 1)
        shared = tables(
            self.config.kinds,
            (mask.sum(1) + written)[:, None],
            back[:, None],
            jnp.concatenate([mask, own], 1),
        )
        logits, new = self._advance(
            token[:, None], shared, 1, cache, prompt + index, caching=True
        )
        # Written here and not by the layers, whose results a scan would copy whole.
        kept = {
            name: layers.put(cache[name], new[name], prompt + index) for name in new
        }
        kept |= {"written": written + 1, "index": (index + 1) % length}
        return logits[:, 0], {**cache, **kept}

    def widen(self, cache: Cache, extra: int) -> Cache:
        """The cache with room for prompts of `extra` more tokens."""

        def wider(name: str, axis: int) -> Any:
            return jax.tree.map(lambda x: layers.widen(x, extra, axis), cache[name])

        axes = {"layers": -2, "last": -2, "mask": 1}
        return cache | {name: wider(name, axes[name]) for name in cache if name in axes}

    def _whole(self, mask: jax.Array, segments: jax.Array | None = None) -> Tables:
        """Tables of rows (b, s) whose every token is a query.

        Tokens see earlier ones of their segment, whose first is at position 0; without
        `segments` a row is one.
        """
        if segments is None:
            place = jnp.arange(mask.shape[1])
            positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
            back = (place[:, None] - place)[None]
        else:
            same = layers.same(segments, segments)[:, 0]
            positions = jnp.tril(same).sum(-1) - 1
            back = jnp.where(same, positions[:, :, None] - positions[:, None], -1)
        return tables(self.config.kinds, positions, back, mask)
