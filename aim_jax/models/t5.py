"""T5 (v1.0: relu, tied head) and T5 v1.1 / Flan-T5 (gated GELU, untied head).

Source: Raffel et al. 2020 (arXiv 1910.10683), names and numerics as Hugging Face's
T5ForConditionalGeneration.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import aim_jax
from aim_jax.models import layers

KIND = "encdec"
EMBEDDING = "shared/weight"
COPIES = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
    "lm_head.weight": "shared.weight",
}
RULES = (
    (r"(shared|head)/weight", P("tensor", "data")),
    (r".*/(q|k|v|wi|wi_0|wi_1)/weight", P("tensor", "data")),
    (r".*/(o|wo)/weight", P("data", "tensor")),
)
# The first releases stored this bias and never used it.
IGNORED = (
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a T5."""

    vocab: int
    width: int
    head_width: int
    heads: int
    mlp: int
    encoder_layers: int
    decoder_layers: int
    buckets: int
    max_distance: int
    eps: float
    activation: str
    gated: bool
    tied: bool
    start: int
    dropout: float
    dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"


def config_from_hf(hf: dict[str, Any]) -> Config:
    """Config of a parsed config.json. Raises InputError for an unknown activation."""
    gated, _, activation = hf.get("feed_forward_proj", "relu").rpartition("-")
    if gated and activation == "gelu":
        activation = "gelu_new"
    if gated not in ("", "gated") or activation not in layers.ACTIVATIONS:
        raise aim_jax.InputError(
            f"config.json: feed_forward_proj '{hf['feed_forward_proj']}' is not supported;"
            f" [gated-] before one of {', '.join(layers.ACTIVATIONS)} is"
        )
    return Config(
        vocab=hf["vocab_size"],
        width=hf["d_model"],
        head_width=hf["d_kv"],
        heads=hf["num_heads"],
        mlp=hf["d_ff"],
        encoder_layers=hf["num_layers"],
        decoder_layers=hf.get("num_decoder_layers") or hf["num_layers"],
        buckets=hf["relative_attention_num_buckets"],
        max_distance=hf.get("relative_attention_max_distance", 128),
        eps=hf["layer_norm_epsilon"],
        activation=activation,
        gated=bool(gated),
        # transformers 5 writes the second field, and the first as true always.
        tied=hf.get("tie_word_embeddings") is not False
        and hf.get("scale_decoder_outputs") is not False,
        start=hf.get("decoder_start_token_id", 0) or 0,
        dropout=hf["dropout_rate"],
    )


def keys(config: Config) -> dict[str, str]:
    """Path of each parameter -> its Hugging Face name with `{}` for the layer number."""
    table = {"shared/weight": "shared.weight"}
    if not config.tied:
        table["head/weight"] = "lm_head.weight"
    mlp = ("wi_0", "wi_1", "wo") if config.gated else ("wi", "wo")
    for side, cross in (("encoder", False), ("decoder", True)):
        block = f"{side}.block.{{}}.layer"
        parts = [("attention", 0, "SelfAttention", "qkvo")]
        if cross:
            parts.append(("cross", 1, "EncDecAttention", "qkvo"))
        parts.append(("mlp", 1 + cross, "DenseReluDense", mlp))
        for ours, index, theirs, names in parts:
            path = f"{side}/layers/{ours}"
            table[f"{path}_norm/weight"] = f"{block}.{index}.layer_norm.weight"
            for name in names:
                table[f"{path}/{name}/weight"] = (
                    f"{block}.{index}.{theirs}.{name}.weight"
                )
        table[f"{side}/relative/weight"] = (
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        )
        table[f"{side}/norm/weight"] = f"{side}.final_layer_norm.weight"
    return table


@functools.lru_cache
def relative_buckets(
    first: int, last: int, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """Bucket, int32, of each distance of a key after its query: exact when near, then log.

    first, last: the distances. Source: Raffel et al. 2020, section 2.1.
    """
    distance = np.arange(first, last + 1)
    side = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        side = np.where(distance > 0, buckets, 0)
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    # float32 all the way: a bucket border must fall where PyTorch puts it.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = (
        ratio / np.float32(np.log(max_distance / exact)) * np.float32(buckets - exact)
    )
    far = np.minimum(exact + ratio.astype(np.int32), buckets - 1)
    return (side + np.where(distance < exact, distance, far)).astype(np.int32)


class RelativeBias(nn.Module):
    """Float32 attention bias (1, h, queries, keys), shared by all layers of a stack.

    The queries are the last of as many positions as there are keys.
    """

    config: Config
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: int, keys: int) -> jax.Array:
        c = self.config
        shape = (c.buckets, c.heads)
        weight = self.param("weight", nn.initializers.normal(0.1), shape)
        found = relative_buckets(
            1 - keys, queries - 1, self.bidirectional, c.buckets, c.max_distance
        )
        by_distance = weight.astype(jnp.float32)[found].T

        def row(first: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(by_distance, first, keys, 1)

        return jax.vmap(row, out_axes=1)(jnp.arange(queries)[::-1])[None]


class Attention(nn.Module):
    """T5 attention (b, t, i): scores are not scaled, the position is in the bias."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        source: jax.Array | None,
        biases: Sequence[jax.Array],
        cache: layers.KeyValues | None = None,
        index: jax.Array | None = None,
    ) -> tuple[jax.Array, layers.KeyValues | None]:
        """The output, and the new keys and values, each (b, h, s, d).

        source: what keys and values are made of; None takes those of `cache`. With an
        `index` those are seen too, but for that position, which the new ones take.
        """
        c = self.config

        def dense(name: str, features: int = c.heads * c.head_width) -> layers.Dense:
            return layers.Dense(features, dtype=c.dtype, name=name)

        def heads(name: str, y: jax.Array) -> jax.Array:
            return layers.split_heads(dense(name)(y), c.heads)

        q_bhtd = heads("q", x)
        new, seen = None, cache
        if source is not None:
            new = heads("k", source), heads("v", source)
            seen = new if index is None else layers.put(cache, new, index)
        key = layers.Dropout(c.dropout).key()
        out = layers.attend(q_bhtd, *seen, biases, c.dropout, key, c.attention)
        return dense("o", c.width)(layers.merge_heads(out)), new


class MLP(nn.Module):
    """Feed-forward block, gated or not."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def dense(name: str, features: int) -> layers.Dense:
            return layers.Dense(features, dtype=c.dtype, name=name)

        act = layers.ACTIVATIONS[c.activation]
        if c.gated:
            h = act(dense("wi_0", c.mlp)(x)) * dense("wi_1", c.mlp)(x)
        else:
            h = act(dense("wi", c.mlp)(x))
        h = layers.Dropout(c.dropout)(h)
        return dense("wo", c.width)(h)


class Layer(nn.Module):
    """One encoder or decoder block: (x, cache) -> (x, new keys and values, if it has one)."""

    config: Config
    cross: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: dict[str, Any] | None,
        encoded: jax.Array | None,
        biases: Sequence[jax.Array],
        cross_biases: Sequence[jax.Array],
        index: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        c = self.config
        kept = cache or {}
        dropout = layers.Dropout(c.dropout)

        def norm(name: str) -> jax.Array:
            return layers.RMSNorm(c.eps, name=name)(x)

        h = norm("attention_norm")
        h, own = Attention(c, name="attention")(h, h, biases, kept.get("own"), index)
        x = x + dropout(h)
        cross = None
        if self.cross:
            h, cross = Attention(c, name="cross")(
                norm("cross_norm"), encoded, cross_biases, kept.get("cross")
            )
            x = x + dropout(h)
        x = x + dropout(MLP(c, name="mlp")(norm("mlp_norm")))
        return layers.by_rows(x), cache and {"own": own, "cross": cross}


class Stack(nn.Module):
    """The layers of one side, from embeddings to the normalised output."""

    config: Config
    decoder: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array | None,
        visible: jax.Array,
        encoder_visible: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        index: jax.Array | None = None,
        ago: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        """Output (b, t, i), new keys and values; `visible` broadcasts to (b, 1, t, s).

        With a cache x is one token, written to `index`; `ago` as `layers.age` says it.
        """
        c = self.config
        dropout = layers.Dropout(c.dropout)
        relative = RelativeBias(c, not self.decoder, name="relative")
        if ago is None:
            bias = relative(x.shape[1], x.shape[1])
        else:
            bias = relative(1, len(ago))[..., len(ago) - 1 - ago]
        biases = [bias, layers.mask_bias(visible)]
        if c.attention == "xla":  # once for all layers
            biases = [sum(biases)]
        cross_biases = [layers.mask_bias(encoder_visible)] if self.decoder else []
        count = c.decoder_layers if self.decoder else c.encoder_layers
        scanned = layers.stack(Layer, count, 4, c.remat)
        x, new = scanned(c, self.decoder, name="layers")(
            dropout(x),
            cache,
            encoded,
            biases,
            cross_biases,
            index,
        )
        return dropout(layers.RMSNorm(c.eps, name="norm")(x)), new


def _inputs_seen(batch: dict[str, jax.Array], numbers: jax.Array | None) -> jax.Array:
    """The inputs that positions of the segments `numbers` (b, t), or all of a row, see."""
    if numbers is None:
        return batch["mask"][:, None, None]
    return layers.same(numbers, batch["segments"])


class Model(nn.Module):
    """T5 for conditional generation."""

    config: Config

    def setup(self) -> None:
        c = self.config
        self.shared = layers.Embed(c.vocab, c.width, c.dtype)
        self.encoder = Stack(c, decoder=False)
        self.decoder = Stack(c, decoder=True)
        if not c.tied:
            self.head = layers.Embed(c.vocab, c.width, c.dtype)

    def encode(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Encoder output (b, s, i)."""
        visible = _inputs_seen(batch, batch.get("segments"))
        return self.encoder(self.shared(batch["inputs"]), None, visible)[0]

    def logits(self, x: jax.Array) -> jax.Array:
        """Float32 logits of decoder outputs."""
        c = self.config
        if c.tied:
            return self.shared.attend(x * c.width**-0.5)
        return self.head.attend(x)

    def __call__(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Float32 logits (b, k, v) of `targets`, teacher-forced."""
        targets = batch["targets"]
        start = jnp.full_like(targets[:, :1], self.config.start)
        tokens = jnp.concatenate([start, targets[:, :-1]], axis=1)
        length = tokens.shape[1]
        causal = np.tril(np.ones((1, 1, length, length), bool))
        owners = batch.get("owners")
        if owners is not None:
            begins = jnp.diff(owners, axis=1, prepend=0) != 0
            tokens = jnp.where(begins, self.config.start, tokens)
            causal = causal & layers.same(owners, owners)
        x, _ = self.decoder(
            self.shared(tokens),
            self.encode(batch),
            causal,
            _inputs_seen(batch, owners),
        )
        return self.logits(x)

    def real(self, path: str, batch: dict[str, jax.Array]) -> jax.Array:
        """Where the positions that the module at `path` runs over are tokens (b, t)."""
        source = path.startswith("encoder/") or path.endswith(("cross/k", "cross/v"))
        return batch["mask"] if source else batch["weights"] > 0

    def prefill(
        self, batch: dict[str, jax.Array], length: int, index: jax.Array | int = 0
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Float32 logits (b, v) of the first token, and the cache for `length` tokens.

        The start token takes the place before `index`.
        """
        c = self.config
        rows = batch["inputs"].shape[0]

        def empty(positions: int) -> tuple[jax.Array, jax.Array]:
            shape = (c.decoder_layers, rows, c.heads, positions, c.head_width)
            return jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)

        cache = {
            "layers": {"own": empty(length), "cross": empty(0)},
            "mask": batch["mask"],
            "written": jnp.zeros(rows, jnp.int32),
            "index": jnp.asarray((index - 1) % length, jnp.int32),
        }
        start = jnp.full((rows,), c.start, jnp.int32)
        return self._advance(start, cache, self.encode(batch))

    def step(
        self, token: jax.Array, cache: dict[str, Any]
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Float32 logits (b, v) of the token after `token` (b,), and the new cache."""
        return self._advance(token, cache, None)

    def widen(self, cache: dict[str, Any], extra: int) -> dict[str, Any]:
        """The cache with room for prompts of `extra` more tokens."""
        cross = [layers.widen(kv, extra, -2) for kv in cache["layers"]["cross"]]
        return {
            **cache,
            "layers": {**cache["layers"], "cross": tuple(cross)},
            "mask": layers.widen(cache["mask"], extra, 1),
        }

    def _advance(
        self, token: jax.Array, cache: dict[str, Any], encoded: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        index, written = cache["index"], cache["written"]
        length = cache["layers"]["own"][0].shape[3]
        ago, visible = layers.age(index, length, written)
        old = cache["layers"]
        x, new = self.decoder(
            self.shared(token[:, None]),
            encoded,
            visible[:, None, None],
            cache["mask"][:, None, None],
            old,
            index,
            ago,
        )
        # Written here and not by the layers, whose results a scan would copy whole.
        own = layers.put(old["own"], new["own"], index)
        kept = {"own": own, "cross": new["cross"] or old["cross"]}
        new = {"layers": kept, "written": written + 1, "index": (index + 1) % length}
        return self.logits(x[:, 0]), {**cache, **new}
