"""How far the models are from PyTorch: what the tests assert, and the table of it.

    PYTHONPATH=. python tests/parity.py          # the table of docs/parity.md; needs torch
    AIM_JAX_GEMMA=DIR PYTHONPATH=. python tests/parity.py gemma    # Gemma 3 270M, minutes

`measure` compares with arrays that `fixtures/make_models.py` recorded, now or earlier.
"""

import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import safetensors.numpy
from fixtures import make_models

from aim_jax import config, evaluate, export, lora, methods, parallel, steps
from aim_jax.data import batches, synthetic
from aim_jax.models import hf

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
    """A model of ours with the adapter that PEFT wrote, and what is compiled for it.

    loss(delta, base tree, batch) -> (loss, logits of `targets`), gradients; train:
    `steps.Steps`; decode: `evaluate.greedy`.
    """

    base: hf.Base
    delta: Any
    cfg: config.Config
    loss: Callable
    train: Callable
    decode: evaluate.Decoder
    devices: parallel.Devices


def open_case(
    folder: pathlib.Path,
    adapter: pathlib.Path,
    rate: float = make_models.RATE,
    dtype: str = "float32",
) -> Case:
    """The case of a model and its adapter, trained as `make_models.record` does."""
    # The references are without dropout, and a train step applies what there is.
    base = hf.load(config.Model(path=str(folder), dtype=dtype, dropout=0.0))
    delta, low = hf.load_adapter(adapter, base.params, base.keys)
    cfg = config.resolve(
        config.Config(
            model=config.Model(path=str(folder)),
            data=config.Data(buckets=(16, 64, 128), target_buckets=(8,), device_rows=8),
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

    def loss(delta: Any, params: Any, leaves: Any) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params, "lora": lora.bind(delta, cfg.lora)}
        found = base.model.apply(variables, leaves)
        each = optax.softmax_cross_entropy_with_integer_labels(found, leaves["targets"])
        weights = leaves["weights"]
        return (each * weights).sum() / weights.sum(), found

    devices = parallel.open_devices(config.Parallel(mode="jit"))
    return Case(
        base,
        delta,
        cfg,
        jax.jit(jax.value_and_grad(loss, has_aux=True)),
        jax.jit(steps.make(base.model, cfg, methods.Method()).train),
        evaluate.greedy(base.model, (make_models.EOS,), cfg, devices),
        devices,
    )


def text(case: Case) -> batches.Text:
    """How a case's rows become batches; they are token ids already."""
    tokenizer = types.SimpleNamespace(eos_token_id=make_models.EOS)
    return batches.Text(tokenizer, case.base.family.KIND, case.cfg.data)


def examples(expected: Arrays) -> list[batches.Example]:
    """The rows that PyTorch was given."""
    return [
        batches.Example("", np.array(source), np.array(target))
        for source, target in make_models.rows_of(expected)
    ]


def batch(case: Case, expected: Arrays, number: int) -> batches.Batch:
    """Training batch `number`, leaves (1, rows, length)."""
    rows = make_models.ROWS
    chosen = examples(expected)[number * rows : (number + 1) * rows]
    return batches.collate(text(case), [chosen], rows)


def logits(case: Case, expected: Arrays, delta: Any) -> np.ndarray:
    """Logits (tokens, v) of the answers of the first batch."""
    leaves = {k: v[0] for k, v in batch(case, expected, 0).items()}
    (_, found), _ = case.loss(delta, case.base.params, leaves)
    return np.asarray(found)[leaves["weights"] > 0]


def nothing(case: Case) -> Any:
    """An adapter that changes nothing."""
    return place(case, jax.tree.map(np.zeros_like, case.delta))


def place(case: Case, tree: Any) -> Any:
    """`tree` where the base is, so that nothing is compiled for two placements."""
    return jax.device_put(tree, jax.tree.leaves(case.base.params)[0].sharding)


def flat(case: Case, delta: Any) -> np.ndarray:
    """An adapter's numbers in the order of PEFT's names."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        hf.save_adapter(path, delta, case.base.keys, case.cfg.lora, "")
        tensors = safetensors.numpy.load_file(path / "adapter_model.safetensors")
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def decode(case: Case, expected: Arrays, rows: int) -> np.ndarray:
    """Greedy tokens (prompts, new tokens), `rows` at a time."""
    made = evaluate.generate(
        case.decode,
        case.base.params,
        nothing(case),
        text(case),
        examples(expected),
        rows,
        case.devices,
    )
    tokens = np.full((len(made), make_models.NEW_TOKENS), make_models.EOS)
    for row, said in zip(tokens, made, strict=True):
        row[: len(said)] = said
    return tokens


def measure(case: Case, expected: Arrays) -> dict[str, float]:
    """Differences from `expected`, by the names of BARS, without the exports'.

    logits, adapted: largest absolute; loss, 20 losses: largest relative; gradients,
    20 steps: norm of the difference over the norm; tokens: rows that differ.
    """
    leaves = {k: v[0] for k, v in batch(case, expected, 0).items()}
    (value, _), gradients = case.loss(case.delta, case.base.params, leaves)
    state = steps.init(case.delta, make_models.STEPS, jax.random.key(0))
    state = place(case, state)
    losses = []
    for step in range(make_models.STEPS):
        leaves = batch(case, expected, step % make_models.BATCHES)
        state, measures = case.train(case.base.params, state, (), leaves)
        losses.append(float(measures["loss"]))
    plain = logits(case, expected, nothing(case))
    found = {
        "logits": _largest(plain, expected["logits"]),
        "adapted": _largest(logits(case, expected, case.delta), expected["adapted"]),
        "loss": abs(float(value) / float(expected["losses"][0]) - 1),
        "gradients": _relative(flat(case, gradients), expected["gradients"]),
        "20 losses": np.abs(np.array(losses) / expected["losses"] - 1).max(),
        "20 steps": _relative(flat(case, state.delta), expected["final"]),
        "tokens": (decode(case, expected, 16) != expected["tokens"]).any(1).sum(),
    }
    return {name: float(v) for name, v in found.items()}


def rounding(
    folder: pathlib.Path, adapter: pathlib.Path, expected: Arrays
) -> tuple[float, float]:
    """RMS difference of bfloat16 logits from PyTorch's float32: ours, PyTorch's."""
    case = open_case(folder, adapter, dtype="bfloat16")
    change = logits(case, expected, nothing(case)) - expected["logits"]
    return float(np.sqrt(np.mean(change**2))), float(expected["bfloat16"])


def exports(case: Case, expected: Arrays, workdir: pathlib.Path) -> dict[str, float]:
    """Largest differences of the logits of what `export` writes, in PyTorch, from ours."""
    import peft

    folder, keys = case.cfg.model.path, case.base.keys
    saved = workdir / "adapters" / "00-task"
    hf.save_adapter(saved, case.delta, keys, case.cfg.lora, folder)
    (workdir / "config.json").write_text(json.dumps(config.to_json(case.cfg)))
    for kind in export.FORMATS:
        export.write(workdir, kind, workdir / kind, None)
    ours = logits(case, expected, case.delta)
    rows = make_models.rows_of(expected)[: make_models.ROWS]
    base = make_models.load(pathlib.Path(folder))
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
    words = batches.Text(tokenizer, "decoder", config.Data())
    # Rows of all tasks in each batch.
    rows = [
        (e.inputs.tolist(), e.targets.tolist())
        for i in range(make_models.PROMPTS // 4)
        for e in batches.encode(words, made[i :: make_models.PROMPTS // 4])
    ]
    make_models.make_adapter(folder, adapter, ["q_proj", "v_proj"], std=0.02)
    return make_models.record(folder, rows, adapter, tokenizer.eos_token_id, GEMMA_RATE)


GEMMA_RATE = 1e-3


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max())


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def main(names: Sequence[str]) -> None:
    """Print the table as Markdown."""
    print(f"| model | scale | {' | '.join(BARS)} | bf16 RMS: ours, PyTorch's |")
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
                rows = make_models.rows(vocab, seed=1)
                expected = make_models.record(folder, rows, adapter)
            case = open_case(folder, adapter, rate)
            found = measure(case, expected) | exports(case, expected, work / "run")
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
