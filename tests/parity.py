"""How far the models are from PyTorch: what the tests assert, and the table of it.

    python tests/parity.py                 # the table of docs/parity.md; needs torch
    AIM_JAX_GEMMA=DIR python tests/parity.py gemma    # the real Gemma 3 270M, minutes

`measure` compares with arrays that `fixtures/make_models.py` recorded, now or earlier.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import safetensors.numpy

from aim_jax import config, evaluate, export, lora, steps
from aim_jax.data import batches, synthetic
from aim_jax.models import hf

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from fixtures import make_models  # noqa: E402

Arrays = dict[str, np.ndarray]
# Largest allowed values; `logits` of a tiny model. Losses and adapters are relative.
BARS = {
    "logits": 2e-5,
    "adapted": 2e-5,
    "loss": 1e-5,
    "gradients": 1e-5,
    "20 losses": 1e-4,
    "20 steps": 1e-4,
    "tokens": 0,
    "peft": 2e-5,
    "merged": 2e-5,
}


class Case(NamedTuple):
    """A model of ours with the adapter that PEFT wrote, and rows as examples."""

    base: hf.Base
    delta: Any
    cfg: config.Config
    text: batches.Text
    examples: list[batches.Example]


def open_case(
    folder: pathlib.Path,
    adapter: pathlib.Path,
    expected: Arrays,
    rate: float = make_models.RATE,
    dtype: str = "float32",
) -> Case:
    """The case of what `make_models.record` gave."""
    # The references are without dropout, and a train step applies what there is.
    base = hf.load(config.Model(path=str(folder), dtype=dtype, dropout=0.0))
    delta, low = hf.load_adapter(adapter, base.params, base.keys)
    cfg = config.resolve(
        config.Config(
            model=config.Model(path=str(folder)),
            lora=dataclasses.replace(low, dropout=0.0),
            train=config.Train(
                batch_size=make_models.ROWS,
                learning_rate=rate,
                warmup_steps=make_models.WARMUP,
                weight_decay=make_models.DECAY,
                clip_norm=make_models.CLIP,
            ),
            eval=config.Eval(max_length=make_models.NEW_TOKENS + 1),
        )
    )
    examples = [
        batches.Example("", source[source >= 0], target[target >= 0])
        for source, target in zip(expected["prompts"], expected["answers"], strict=True)
    ]
    data = config.Data(buckets=(16, 64, 128), target_buckets=(8,))
    return Case(base, delta, cfg, batches.Text(None, base.family.KIND, data), examples)


def batch(case: Case, number: int) -> batches.Batch:
    """Training batch `number`, leaves (1, rows, length)."""
    rows = make_models.ROWS
    chosen = case.examples[number * rows : (number + 1) * rows]
    return batches.collate(case.text, [chosen], rows)


def logits(case: Case, delta: Any = None) -> np.ndarray:
    """Logits (tokens, v) of the answers of the first batch."""
    leaves = {k: v[0] for k, v in batch(case, 0).items()}
    variables = {"params": case.base.params}
    if delta is not None:
        variables["lora"] = lora.bind(delta, case.cfg.lora)
    found = jax.jit(case.base.model.apply)(variables, leaves)
    return np.asarray(found)[leaves["weights"] > 0]


def flat(case: Case, delta: Any) -> np.ndarray:
    """An adapter's numbers in the order of PEFT's names."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        hf.save_adapter(path, delta, case.base.keys, case.cfg.lora, "")
        tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def decode(case: Case, rows: int) -> np.ndarray:
    """Greedy tokens (prompts, new tokens) in batches of `rows`."""
    run = evaluate.greedy(case.base.model, make_models.EOS, case.cfg)
    fresh = lora.init(
        jax.random.key(0), case.base.params, case.base.keys, case.cfg.lora
    )
    found = []
    for start in range(0, len(case.examples), rows):
        chosen = case.examples[start : start + rows]
        found.append(
            run(case.base.params, fresh, batches.prompts(case.text, chosen, rows))
        )
    return np.concatenate(found)


def measure(
    folder: pathlib.Path,
    adapter: pathlib.Path,
    expected: Arrays,
    rate: float = make_models.RATE,
) -> dict[str, float]:
    """Differences from `expected`, by the names of BARS, without the exports'.

    logits, adapted: largest absolute; loss, 20 losses: largest relative; gradients,
    20 steps: norm of the difference over the norm; tokens: rows that differ.
    """
    case = open_case(folder, adapter, expected, rate)
    params = case.base.params

    def loss(delta: Any, leaves: Any) -> jax.Array:
        found = case.base.model.apply(
            {"params": params, "lora": lora.bind(delta, case.cfg.lora)}, leaves
        )
        each = optax.softmax_cross_entropy_with_integer_labels(found, leaves["targets"])
        return (each * leaves["weights"]).sum() / leaves["weights"].sum()

    first = {k: v[0] for k, v in batch(case, 0).items()}
    value, gradients = jax.jit(jax.value_and_grad(loss))(case.delta, first)

    train = jax.jit(steps.make(case.base.model, case.cfg).train)
    state = steps.init(case.delta, make_models.STEPS, jax.random.key(0))
    losses = []
    for step in range(make_models.STEPS):
        leaves = batch(case, step % make_models.BATCHES)
        state, measures = train(params, state, (), leaves)
        losses.append(float(measures["loss"]))

    found = {
        "logits": _largest(logits(case), expected["logits"]),
        "adapted": _largest(logits(case, case.delta), expected["adapted"]),
        "loss": abs(float(value) / float(expected["losses"][0]) - 1),
        "gradients": _relative(flat(case, gradients), expected["gradients"]),
        "20 losses": np.abs(np.array(losses) / expected["losses"] - 1).max(),
        "20 steps": _relative(flat(case, state.delta), expected["final"]),
        "tokens": (decode(case, 16) != expected["tokens"]).any(1).sum(),
    }
    return {name: float(v) for name, v in found.items()}


def rounding(
    folder: pathlib.Path, adapter: pathlib.Path, expected: Arrays
) -> tuple[float, float]:
    """Largest differences of bfloat16 logits from PyTorch's float32: ours, PyTorch's."""
    case = open_case(folder, adapter, expected, dtype="bfloat16")
    return _largest(logits(case), expected["logits"]), float(expected["bfloat16"])


def exports(
    folder: pathlib.Path, adapter: pathlib.Path, expected: Arrays, workdir: pathlib.Path
) -> dict[str, float]:
    """Largest differences of the logits of what `export` writes, in PyTorch, from ours."""
    import peft

    case = open_case(folder, adapter, expected)
    saved = workdir / "adapters" / "00-task"
    hf.save_adapter(saved, case.delta, case.base.keys, case.cfg.lora, str(folder))
    (workdir / "config.json").write_text(json.dumps(config.to_json(case.cfg)))
    for kind in export.FORMATS:
        export.write(workdir, kind, workdir / kind, None)
    ours = logits(case, case.delta)
    rows = make_models.rows_of(expected)[: make_models.ROWS]
    base = make_models.load(folder)
    leaves = make_models.pack(rows, base.config.is_encoder_decoder)
    adapted = peft.PeftModel.from_pretrained(base, str(workdir / "peft")).eval()
    merged = make_models.load(workdir / "merged")
    return {
        "peft": _largest(make_models.answer_logits(adapted, leaves), ours),
        "merged": _largest(make_models.answer_logits(merged, leaves), ours),
    }


def gemma(folder: pathlib.Path, adapter: pathlib.Path) -> Arrays:
    """What PyTorch computes with a real Gemma 3 on rows of the embedded tasks."""
    tokenizer = batches.tokenizer(folder)
    made = [
        row
        for name in synthetic.NAMES[:4]
        for row in synthetic.task(name, 0, make_models.PROMPTS // 4, 0, 0)["train"]
    ]
    text = batches.Text(tokenizer, "decoder", config.Data())
    # Rows of all tasks in each batch.
    examples = [
        (e.inputs.tolist(), e.targets.tolist())
        for i in range(make_models.PROMPTS // 4)
        for e in batches.encode(text, made[i :: make_models.PROMPTS // 4])
    ]
    make_models.make_adapter(folder, adapter, ["q_proj", "v_proj"], std=0.02)
    return make_models.record(
        folder, examples, adapter, tokenizer.eos_token_id, GEMMA_RATE
    )


GEMMA_RATE = 1e-3


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def main(names: Sequence[str]) -> None:
    """Print the table as Markdown."""
    print(f"| model | scale | {' | '.join(BARS)} | bf16: ours, PyTorch's |")
    print("|---" * (len(BARS) + 3) + "|")
    for name in names or make_models.CONFIGS:
        with tempfile.TemporaryDirectory() as scratch:
            work = pathlib.Path(scratch)
            folder = make_models.FOLDER / name
            adapter, rate = folder / "adapter", make_models.RATE
            if name == "gemma":
                folder = pathlib.Path(os.environ["AIM_JAX_GEMMA"])
                adapter, rate = work / "adapter", GEMMA_RATE
                expected = gemma(folder, adapter)
            else:
                vocab = make_models.CONFIGS[name]["vocab_size"]
                examples = make_models.rows(vocab, seed=1)
                expected = make_models.record(folder, examples, adapter)
            found = measure(folder, adapter, expected, rate)
            found |= exports(folder, adapter, expected, work / "run")
            ours, theirs = rounding(folder, adapter, expected)
        numbers = [
            f"{found[k]:.1e}" if bar else f"{found[k]:.0f}" for k, bar in BARS.items()
        ]
        scale = np.abs(expected["logits"]).max()
        print(
            f"| {name} | {scale:.1f} | {' | '.join(numbers)} | {ours:.2g}, {theirs:.2g} |",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
