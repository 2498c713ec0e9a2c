"""The PyTorch side of `python -m aim_jax.benchmark --against torch`.

transformers and PEFT as their users run them: the base in training mode (dropout), each
micro-batch padded to its longest row, logits at all positions.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import peft
import torch
import transformers

import aim_jax
from aim_jax import jobs
from aim_jax.data import batches
from aim_jax.models import hf

Rows = Sequence[batches.Example]
Batch = dict[str, torch.Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Side(NamedTuple):
    """What PyTorch does.

    batch(rows) -> what the model takes, on its device; train(batches) -> loss: an optimizer
    step on micro-batches; lacking(batches, batch) -> why there is no room for that and a
    probe, or None; probe(batch) -> loss, with dropout; loss(batch) -> loss, without;
    generate(rows, size) -> new tokens of each row, greedily.
    """

    batch: Callable[[Rows], Batch]
    train: Callable[[Sequence[Batch]], float]
    lacking: Callable[[Sequence[Batch], Batch], str | None]
    probe: Callable[[Batch], float]
    loss: Callable[[Batch], float]
    generate: Callable[[Rows, int], list[list[int]]]


def sides(job: jobs.Job, compiled: bool) -> dict[str, Side]:
    """PyTorch for the model and settings of a job: eager, and by torch.compile.

    On a CPU it has the threads that this process may use; on a GPU, where JAX's products of
    float32 are TF32, so are its own. Raises InputError where one has a GPU and one has none.
    """
    if (jax.default_backend() == "gpu") != (DEVICE == "cuda"):
        raise aim_jax.InputError(
            f"--against torch: JAX runs on {jax.default_backend()}, PyTorch on {DEVICE};"
            " install both for the same device, or hide it by JAX_PLATFORMS=cpu and"
            " CUDA_VISIBLE_DEVICES="
        )
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")
    if hasattr(os, "sched_getaffinity"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = adapted(job)
    found = {"torch": side(job, model, model)}
    if compiled:
        found["torch.compile"] = side(job, model, torch.compile(model))
    return found


def adapted(job: jobs.Job) -> peft.PeftModel:
    """The model of a job, with the adapter of its settings."""
    cfg, encdec = job.cfg, job.text.kind == "encdec"
    auto = transformers.AutoModelForCausalLM
    if encdec:
        auto = transformers.AutoModelForSeq2SeqLM
    folder, dtype = hf.directory(cfg.model.path), getattr(torch, cfg.model.dtype)
    return peft.get_peft_model(
        auto.from_pretrained(folder, dtype=dtype).to(DEVICE),
        peft.LoraConfig(
            r=cfg.lora.r,
            lora_alpha=cfg.lora.alpha,
            lora_dropout=cfg.lora.dropout,
            target_modules=list(cfg.lora.target),
            use_rslora=cfg.lora.use_rslora,
            task_type="SEQ_2_SEQ_LM" if encdec else "CAUSAL_LM",
        ),
    )


def side(job: jobs.Job, model: peft.PeftModel, fast: Callable) -> Side:
    """fast: what the forward passes of training call in place of `model`."""
    cfg, encdec = job.cfg, job.text.kind == "encdec"
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=cfg.train.learning_rate, weight_decay=cfg.train.weight_decay
    )

    def padded(lists: Sequence[Any], fill: int, left: bool = False) -> torch.Tensor:
        width = max(map(len, lists))
        made = [[fill] * (width - len(x)) for x in lists]
        pairs = zip(made, lists, strict=True)
        rows = [[*p, *x] if left else [*x, *p] for p, x in pairs]
        return torch.tensor(rows, dtype=torch.long, device=DEVICE)

    def batch(rows: Rows) -> Batch:
        inputs, labels = [e.inputs for e in rows], [e.targets for e in rows]
        if not encdec:
            inputs = [[*e.inputs, *e.targets] for e in rows]
            labels = [[*[-100] * len(e.inputs), *e.targets] for e in rows]
        return {
            "input_ids": padded(inputs, 0),
            "attention_mask": padded([[1] * len(x) for x in inputs], 0),
            "labels": padded(labels, -100),
        }

    def train(micros: Sequence[Batch]) -> float:
        model.train()
        optimizer.zero_grad()
        total = 0.0
        for micro in micros:
            value = fast(**micro).loss / len(micros)
            value.backward()
            total += value.item()
        torch.nn.utils.clip_grad_norm_(weights, cfg.train.clip_norm)
        optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return total

    def lacking(micros: Sequence[Batch], recalled: Batch) -> str | None:
        try:
            train(micros)
            probe(recalled)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        else:
            return None
        optimizer.zero_grad()
        torch.cuda.empty_cache()
        return reason

    @torch.no_grad()
    def probe(batch: Batch) -> float:
        model.train()
        return fast(**batch).loss.item()

    @torch.no_grad()
    def loss(batch: Batch) -> float:
        model.eval()
        return model(**batch).loss.item()

    @torch.no_grad()
    def generate(rows: Rows, size: int) -> list[list[int]]:
        model.eval()
        eos, made = job.text.tokenizer.eos_token_id, []
        for start in range(0, len(rows), size):
            inputs = [e.inputs for e in rows[start : start + size]]
            ids = padded(inputs, 0, left=not encdec)
            mask = padded([[1] * len(x) for x in inputs], 0, left=not encdec)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=cfg.eval.max_length - 1,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=0,
            )
            for row in out[:, 1 if encdec else ids.shape[1] :].tolist():
                made.append(row[: row.index(eos)] if eos in row else row)
        return made

    return Side(batch, train, lacking, probe, loss, generate)
