"""The recorded stream run freely, by this package or by PyTorch, under gradient noise:

PYTHONPATH=.:tests python tests/free_run.py FOLDER jax|torch SEED...

The whole main job in the `release` preset, from the recorded first adapter, on the recorded
batches of each task and of each probe; every gradient is multiplied by 1 + 1e-6 N(0, 1).
With `torch`, PyTorch computes the steps, everything else is the same. Prints OP, BWT, FWT
(against the recorded single-task scores) and the merges of each task. A run in FOLDER that
was stopped goes on.
"""

import dataclasses
import functools
import json
import pathlib
import sys

import against_release
import golden
import jax
import numpy as np
import referee
import torch
from test_golden import Kit

from aim_jax import config, jobs, metrics, run, steps


def noisy() -> None:
    """Multiply every gradient that reaches Adam by noise of the state's key."""
    adam, init, box = steps._adam, steps.make, {}

    def _adam(grads, state):
        key = jax.random.fold_in(box["key"], state.count)
        leaves, tree = jax.tree.flatten(grads)
        keys = jax.random.split(key, len(leaves))
        noise = referee.NOISE
        leaves = [
            g * (1 + noise * jax.random.normal(k, g.shape))
            for g, k in zip(leaves, keys, strict=True)
        ]
        return adam(tree.unflatten(leaves), state)

    def make(*args):
        def keyed(f):
            @functools.wraps(f)
            def call(base, state, *rest, **named):
                box["key"] = jax.random.wrap_key_data(state.key)
                return f(base, state, *rest, **named)

            return call

        pure = init(*args)
        return pure._replace(train=keyed(pure.train), rehearse=keyed(pure.rehearse))

    steps._adam, steps.make = _adam, make


class Torch:
    """The steps of `steps.Steps`, computed by PyTorch on one thread."""

    def __init__(self, kit: Kit, seed: int):
        self.kit, self.it = kit, referee.Referee(torch.float32, seed)

    def read(self, state: steps.State) -> None:
        it, vector = self.it, self.kit.vector
        it.write(it.parameters, vector(state.delta))
        it.write(it.mu, vector(state.adam.mu))
        it.write(it.nu, vector(state.adam.nu))
        it.count = int(state.adam.count)

    def state(self, like: steps.State) -> steps.State:
        it = self.it
        delta, mu, nu = (
            self.kit.tree(torch.cat([x.detach().flatten() for x in part]).numpy())
            for part in (it.parameters, it.mu, it.nu)
        )
        adam = like.adam._replace(count=np.int32(it.count), mu=mu, nu=nu)
        return like._replace(delta=delta, adam=adam)

    def rate(self, state: steps.State) -> float:
        cfg = self.kit.cfg.train
        return float(steps.learning_rate(int(state.step), int(state.total), cfg))

    def train(self, base, state, memo, batch, chunk):
        before = self.kit.vector(state.delta)
        self.read(state)
        rate = self.rate(state)
        loss, norm = self.it.update(micro(batch), rate)
        after = self.state(state)._replace(step=state.step + 1)
        change = self.kit.vector(after.delta) - before
        measures = {
            "loss": loss,
            "grad_norm": norm,
            "lr": rate,
            "movement": float(np.abs(change).mean()),
            "distance": float(np.linalg.norm(change)),
        }
        if chunk["mask"].any():
            measures["history"] = self.probe(base, after, memo, chunk)
        return after, measures

    def probe(self, base, state, memo, batch):
        self.it.write(self.it.parameters, self.kit.vector(state.delta))
        with torch.no_grad():
            return np.float32(self.it.loss(micro(batch, 0)).item())

    def rehearse(self, base, state, memo, chunk, count):
        self.read(state)
        rate, losses = self.rate(state), []
        for i in range(count):
            losses.append(self.it.update(micro(chunk, i), rate)[0])
        return self.state(state), losses

    def validate(self, base, adapter, batch):
        self.it.write(self.it.parameters, self.kit.vector(adapter))
        inputs = micro(batch)
        with torch.no_grad():
            logits = self.it.model(**inputs).logits
        weights = np.array(batch["weights"]).reshape(-1, batch["weights"].shape[-1])
        rows = weights.any(-1)
        weights = torch.as_tensor(weights[rows, : logits.shape[1]])
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), inputs["labels"], reduction="none"
        )
        return float((losses * weights).sum())


def micro(batch: dict[str, jax.Array], number: int | None = None) -> referee.Batch:
    """A batch, or one of a chunk, as transformers takes it, without padding alone."""
    leaves = {k: np.array(v if number is None else v[number]) for k, v in batch.items()}
    leaves = {k: v.reshape(-1, v.shape[-1]) for k, v in leaves.items()}
    rows = leaves["mask"].any(-1)
    length = leaves["mask"].any(0).nonzero()[0].max() + 1
    kept = leaves["weights"] > 0
    width = kept.any(0).nonzero()[0].max() + 1
    labels = np.where(kept, leaves["targets"], -100)
    return {
        "input_ids": torch.as_tensor(leaves["inputs"][rows, :length]).long(),
        "attention_mask": torch.as_tensor(leaves["mask"][rows, :length]),
        "labels": torch.as_tensor(labels[rows, :width]).long(),
    }


def main(folder: pathlib.Path, engine: str, seeds: list[int]) -> None:
    kit = Kit()
    cfg = dataclasses.replace(
        against_release.free(kit),
        parallel=config.Parallel(mode="jit", speculate=False),
    )
    against_release.feed(kit)
    if engine == "jax":
        noisy()
    torch.set_num_threads(1)
    init = steps.init
    single = golden.read("metrics.json")["fwt_single_task"]
    for seed in seeds:
        steps.init = lambda delta, total, key, *carry, seed=seed: init(
            delta, total, jax.random.key(seed), *carry
        )
        if engine == "torch":
            it = Torch(kit, seed)
            made = steps.Steps(it.train, it.probe, it.rehearse, it.validate, None)
            jobs.compile_steps = lambda *args, made=made: made
        own = folder / f"{engine}{seed}"
        results = run.run(cfg, own)
        matrix = [row[: i + 1] for i, row in enumerate(results["matrix"])]
        merges = np.bincount(
            [row["task"] for row in map(json.loads, open(own / "merges.jsonl"))],
            minlength=len(matrix),
        )
        print(
            f"| {engine} | {seed} | {100 * metrics.op(matrix):.2f} |"
            f" {100 * metrics.bwt(matrix):.2f} | {100 * metrics.fwt(matrix, single):.2f} |"
            f" {' '.join(map(str, merges[1:]))} | {results['seconds']['train']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], [int(s) for s in sys.argv[3:]])
