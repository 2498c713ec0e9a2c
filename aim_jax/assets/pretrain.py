"""Make the embedded base model: its tokenizer, its config, its weights, its README.

python -m aim_jax.assets.pretrain [--out DIR] [--steps N]

A small T5 (v1.0) learns span corruption (Raffel et al. 2020, section 3.1.4) on generated
text, and exercises on it, all weights with AdamW. The embedded tasks are not seen.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import random
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tokenizers.decoders
import tokenizers.models
import tokenizers.normalizers
import tokenizers.pre_tokenizers
import tokenizers.processors
import tokenizers.trainers
from absl import app, flags

from aim_jax.assets import exercises
from aim_jax.data import batches, synthetic
from aim_jax.models import hf

_OUT = flags.DEFINE_string("out", str(hf.ASSETS), "folder to write")
_STEPS = flags.DEFINE_integer("steps", 4000, "optimizer steps", lower_bound=200)

SEED = 0
ROWS = 32
LEARNING_RATE = 1e-2
WARMUP = 100
SPANS = 0.25  # part of the batches that are span corruption
LENGTHS = (32, 48, 64)
TARGETS = {"spans": 16, "exercises": 4}
SPECIAL = ("<pad>", "</s>", "<unk>")
SENTINELS = tuple(f"<extra_id_{i}>" for i in range(8))
CONFIG = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 3072,
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 384,
    "num_heads": 4,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "feed_forward_proj": "relu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "dropout_rate": 0.0,
    "is_encoder_decoder": True,
    "tie_word_embeddings": True,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "torch_dtype": "float32",
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}

README = """# The embedded base model

A small T5 (v1.0) in Hugging Face layout, made from nothing but generated text:

    python -m aim_jax.assets.pretrain --steps {steps}

The text and the exercises are those of `exercises.py`; the embedded tasks
(`aim_jax/data/synthetic.py`) were not seen.

| | |
|---|---|
| steps, rows a step, seed | {steps}, {rows}, {seed} |
| final loss: span corruption, exercises | {spans:.3f}, {exercises:.3f} |
| span corruption loss on other text | {held:.3f} |
| time | {minutes:.1f} min on {machine}, other work beside it |
| versions | Python {python}, {versions} |

Exact match on exercises that were held out:

| exercise | score |
|---|---|
{table}
"""

Pair = tuple[list[int], list[int]]
Batch = dict[str, np.ndarray]
Tree = Any


def make_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE that knows the words of the text; any other text goes by pieces.

    A space goes before the text, so that a word has one token wherever it stands, and
    decoding takes it away: `decode(encode(text))` is `text`, whatever it holds.
    """
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.normalizer = tokenizers.normalizers.Prepend(" ")
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.ByteLevel(),
            tokenizers.decoders.Strip(" ", left=1, right=0),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"] - len(SENTINELS),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(_corpus(), trainer)
    made.add_special_tokens(list(SENTINELS))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>",
        pair="$A </s> $B </s>",
        special_tokens=[("</s>", 1)],
    )
    return made


def _corpus() -> Iterator[str]:
    rng = random.Random(SEED)
    for _ in range(3000):
        yield exercises.text(rng)
        yield " ".join(exercises.exercise(rng)[1:])
    for name in synthetic.NAMES:
        for row in synthetic.task(name, SEED, 100, 0, 0)["train"]:
            yield row["input"]
            yield row["output"]
    words = [*exercises.WORDS, *exercises.LEXICON, *exercises.kinds()]
    for word in dict.fromkeys(words):
        yield from [word] * 20
        # Word endings, for text of other words.
        yield from (word + ending for ending in ("s", "ed", "ing", "er", "ly"))


def corrupt(tokens: list[int], rng: random.Random, sentinels: list[int]) -> Pair:
    """Tokens with spans replaced by sentinels, and the spans after their sentinels."""
    inputs: list[int] = []
    targets: list[int] = []
    marks = iter(sentinels)
    i = 0
    while i < len(tokens):
        size = 1 + int(rng.random() * 3)
        # Spans of 2 tokens on average that cover a fifth of the text, never adjacent.
        if rng.random() < 0.12 and len(targets) < 11:
            mark = next(marks)
            inputs.append(mark)
            targets += [mark, *tokens[i : i + size]]
            i += size
        inputs += tokens[i : i + 1]
        i += 1
    return [*inputs, 1], [*targets, 1]


def held_out(text: str) -> bool:
    """Whether an exercise is kept for the evaluation: 2 % of all, by their text."""
    return zlib.crc32(text.encode()) % 50 == 0


def examples(
    made: tokenizers.Tokenizer, rng: random.Random, kind: str, count: int
) -> list[Pair]:
    """Token ids of inputs and targets, each with its end."""
    if kind == "spans":
        texts = made.encode_batch(
            [f"{exercises.text(rng)} {exercises.text(rng)}" for _ in range(count)]
        )
        sentinels = [made.token_to_id(s) for s in SENTINELS]
        return [corrupt(t.ids[:-1], rng, sentinels) for t in texts]
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        _, text, output = exercises.exercise(rng)
        if not held_out(text):
            pairs.append((text, output))
    return encode(made, pairs)


def encode(made: tokenizers.Tokenizer, pairs: list[tuple[str, str]]) -> list[Pair]:
    """Token ids of texts."""
    inputs, outputs = (made.encode_batch(list(t)) for t in zip(*pairs, strict=True))
    return [(a.ids, b.ids) for a, b in zip(inputs, outputs, strict=True)]


def collate(pairs: list[Pair], width: int) -> Batch:
    """A batch padded to the smallest length that holds it, and to `width` targets."""
    length = batches.bucket(max(len(a) for a, _ in pairs), LENGTHS)
    inputs = np.zeros((len(pairs), length), np.int32)
    targets = np.zeros((len(pairs), width), np.int32)
    for row, (a, b) in enumerate(pairs):
        inputs[row, : len(a)] = a
        targets[row, : len(b)] = b
    return {
        "inputs": inputs,
        "mask": inputs != 0,
        "targets": targets,
        "weights": (targets != 0).astype(np.float32),
    }


def stream(made: tokenizers.Tokenizer) -> Iterator[tuple[str, Batch]]:
    """Kind and batch, without end; all rows of a batch have the same bucket."""
    rng = random.Random(SEED)
    ready: dict[str, list[Batch]] = {kind: [] for kind in TARGETS}
    while True:
        kind = "spans" if rng.random() < SPANS else "exercises"
        while not ready[kind]:
            groups: dict[int, list[Pair]] = {}
            for pair in examples(made, rng, kind, 32 * ROWS):
                length = batches.bucket(len(pair[0]), LENGTHS)
                groups.setdefault(length, []).append(pair)
            full = [
                collate(group[i : i + ROWS], TARGETS[kind])
                for group in groups.values()
                for i in range(0, len(group) - ROWS + 1, ROWS)
            ]
            ready[kind] = synthetic.shuffled(rng, full)
        yield kind, ready[kind].pop()


def init(model: Any) -> Tree:
    """Random parameters with the standard deviations of T5."""
    c = CONFIG
    inner = c["num_heads"] * c["d_kv"]
    spread = {
        "q": (c["d_model"] * c["d_kv"]) ** -0.5,
        "k": c["d_model"] ** -0.5,
        "v": c["d_model"] ** -0.5,
        "o": inner**-0.5,
        "wi": c["d_model"] ** -0.5,
        "wo": c["d_ff"] ** -0.5,
        "relative": c["d_model"] ** -0.5,
        "shared": 1.0,
    }
    rng = np.random.default_rng(SEED)
    params = {}
    for path, leaf in hf.flatten(hf.abstract(model)).items():
        name = path.split("/")[-2]
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        params[path] = jnp.asarray(
            np.ones_like(noise) if "norm" in name else noise * spread[name]
        )
    return hf.unflatten(params)


def make_step(
    model: Any, optimizer: optax.GradientTransformation
) -> tuple[Callable, Callable]:
    """Compiled update (params, state, batch) -> (params, state, loss), and `right`.

    right(params, batch) -> (loss, bool (b,)): whether every target token is the most
    likely one, which is to say that greedy decoding gives the target.
    """

    def loss(params: Tree, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        )
        hit = (logits.argmax(-1) == batch["targets"]) | (batch["weights"] == 0)
        weights = batch["weights"]
        return jnp.sum(losses * weights) / jnp.sum(weights), hit.all(-1)

    @jax.jit
    def step(params: Tree, state: Tree, batch: Batch) -> tuple[Tree, Tree, jax.Array]:
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, jax.jit(loss)


def evaluate(
    made: tokenizers.Tokenizer, right: Callable, params: Tree
) -> tuple[float, dict[str, float]]:
    """Loss of span corruption, and exact match of each exercise, on held-out text."""
    rng = random.Random(SEED + 1)
    pairs = examples(made, rng, "spans", 512)
    loss = float(right(params, collate(pairs, TARGETS["spans"]))[0])
    scores = {}
    for name, write in exercises.EXERCISES.items():
        texts: dict[str, str] = {}
        for _ in range(100_000):
            text, output = write(rng)
            if held_out(text):
                texts[text] = output
            if len(texts) == 256:
                break
        pairs = encode(made, list(texts.items()))
        hits = right(params, collate(pairs, TARGETS["exercises"]))[1]
        scores[name] = float(hits.mean())
    return loss, scores


def readme(
    steps: int,
    seconds: float,
    final: dict[str, float],
    loss: float,
    scores: dict[str, float],
) -> str:
    """What the model is, how it was made and how well it does."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "flax", "optax", "tokenizers")
    )
    table = "\n".join(f"| {name} | {score:.2f} |" for name, score in scores.items())
    return README.format(
        steps=steps,
        minutes=seconds / 60,
        seed=SEED,
        rows=ROWS,
        spans=final["spans"],
        exercises=final["exercises"],
        held=loss,
        table=table,
        python=platform.python_version(),
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        versions=versions,
    )


def main(_: list[str]) -> None:
    folder = pathlib.Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    made = make_tokenizer()
    made.save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    family, config = hf.read_config(folder)
    model = family.Model(config)
    steps = _STEPS.value
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, WARMUP, steps)
    # Steps in proportion to the size of a weight, as T5 takes them.
    optimizer = optax.chain(
        optax.scale_by_adam(b2=0.98),
        optax.scale_by_param_block_rms(),
        optax.scale_by_learning_rate(rate),
    )
    step, right = make_step(model, optimizer)
    params = init(model)
    state = optimizer.init(params)
    began = time.perf_counter()
    recent: dict[str, list[jax.Array]] = {kind: [] for kind in TARGETS}
    for number, (kind, batch) in zip(range(1, steps + 1), stream(made), strict=False):
        params, state, loss = step(params, state, batch)
        recent[kind].append(loss)
        if number % 100 == 0 or number == steps:
            final = {k: float(np.mean(jax.device_get(v))) for k, v in recent.items()}
            recent = {kind: [] for kind in TARGETS}
            seconds = time.perf_counter() - began
            print(f"step {number} {seconds:.0f} s loss {final}", flush=True)
    hf.save(folder, params, family.keys(config))
    seconds = time.perf_counter() - began
    loss, scores = evaluate(made, right, params)
    text = readme(steps, seconds, final, loss, scores)
    (folder / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    app.run(main)
