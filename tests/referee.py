"""PyTorch plays a recorded segment again: `PYTHONPATH=. python tests/referee.py TASK STEP [WAY]`.

TASK: a recorded task's file without its ending; STEP: one of its restart points; WAY:
`float32`, `float64`, or a seed: float32 with every gradient multiplied by
1 + 1e-6 N(0, 1). Prints how far each is from the recording: what no other implementation
can be asked to do better. Rules: golden README, semantics of a step.
"""

import sys

import golden
import numpy as np
import peft
import torch
import transformers

NOISE = 1e-6
Batch = dict[str, torch.Tensor]  # what transformers takes

BETAS, EPS, CLIP_EPS, WARMUP = (0.9, 0.999), 1e-8, 1e-6, 50


class Referee:
    """The model, its adapter and Adam's moments in one precision."""

    def __init__(self, dtype: torch.dtype, seed: int | None):
        self.hyper = golden.read("hyperparameters.json")["common"]
        self.layout = golden.read("lora_layout.json")
        base = transformers.T5ForConditionalGeneration.from_pretrained(
            golden.FOLDER / "base", dtype=dtype
        )
        options = peft.LoraConfig(
            r=self.hyper["lora_r"],
            lora_alpha=self.hyper["lora_alpha"],
            target_modules=["q", "v"],
        )
        self.model = peft.get_peft_model(base, options).to(dtype).eval()
        found = dict(self.model.named_parameters())
        self.parameters = [
            found[e["name"].replace(".weight", ".default.weight")] for e in self.layout
        ]
        self.dtype, self.count = dtype, 0
        self.mu = [torch.zeros_like(p) for p in self.parameters]
        self.nu = [torch.zeros_like(p) for p in self.parameters]
        self.noise = None if seed is None else torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def write(self, tensors: list[torch.Tensor], vector: np.ndarray) -> None:
        for entry, tensor in zip(self.layout, tensors, strict=True):
            part = vector[entry["offset"] : entry["offset"] + entry["size"]]
            tensor.copy_(torch.as_tensor(part.reshape(entry["shape"])))

    def vector(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def loss(self, batch: Batch) -> torch.Tensor:
        return self.model(**batch).loss

    def update(self, batch: Batch, rate: float) -> list[float]:
        """Loss and gradient norm before the update."""
        loss = self.loss(batch)
        grads = torch.autograd.grad(loss, self.parameters)
        if self.noise:
            grads = [
                g * (1 + NOISE * torch.randn(g.shape, generator=self.noise))
                for g in grads
            ]
        self.gradient = torch.cat([g.flatten() for g in grads]).numpy()
        norm = torch.as_tensor(self.gradient).norm()
        clip = (1 / (norm + CLIP_EPS)).clamp(max=1)
        self.count += 1
        unbias1, unbias2 = (1 - b**self.count for b in BETAS)
        with torch.no_grad():
            for p, g, m, v in zip(
                self.parameters, grads, self.mu, self.nu, strict=True
            ):
                m.lerp_(g * clip, 1 - BETAS[0])
                v.mul_(BETAS[1]).add_((g * clip) ** 2, alpha=1 - BETAS[1])
                p.addcdiv_(m, (v / unbias2).sqrt() + EPS, value=-rate / unbias1)
        return [loss.item(), norm.item()]


def padded(data: golden.Trace, rows: np.ndarray) -> Batch:
    """Rows of the token table as the recorded batch had them."""
    examples = golden.examples(data, rows)
    length, width = (-(-max(len(e[i]) for e in examples) // 8) * 8 for i in (1, 2))
    inputs = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), width), -100)
    for i, example in enumerate(examples):
        inputs[i, : len(example.inputs)] = torch.as_tensor(example.inputs)
        labels[i, : len(example.targets)] = torch.as_tensor(example.targets)
    return {"input_ids": inputs, "attention_mask": inputs != 0, "labels": labels}


def apart(ours: np.ndarray, recorded: np.ndarray) -> float:
    """Distance relative to the norm of what was recorded."""
    return float(np.linalg.norm(ours - recorded) / np.linalg.norm(recorded))


def play(name: str, start: int, dtype: torch.dtype, seed: int | None) -> dict[str, str]:
    """Largest relative deviations up to the next merge, or over 25 steps."""
    data, it, worst = golden.trace(name), Referee(dtype, seed), {}
    assert len(data["mb_step"]) == len(data["lr"]), "one micro-batch a step"
    merges = data.get("merge_step", np.array([], int)).tolist()
    done = sum(s <= start for s in merges)
    origin = data["merge_after"][done - 1] if done else data["lora_start"]
    it.write(it.parameters, origin)
    if start:
        tags = zip(data["adam_tag"].tolist(), data["adam_step"].tolist(), strict=True)
        at = [i for i, t in enumerate(tags) if t[1] == start][-1]
        if data["adam_tag"][at] == "after_inner_step":
            kept = data["snap_step"].tolist().index(start)
            it.write(it.parameters, data["snap_lora"][kept])
        it.write(it.mu, data["adam_m"][at])
        it.write(it.nu, data["adam_v"][at])
        it.count = int(data["adam_count"][at])
    origin = torch.as_tensor(origin).to(dtype)
    rates = [*data["lr"], 0.0]  # rehearsal after step s has the rate of step s + 1

    def note(quantity: str, value: float) -> None:
        worst[quantity] = max(worst.get(quantity, 0.0), abs(value))

    last = len(data["lr"]) if start and merges else start + 25
    for step in range(start + 1, last + 1):
        loss, norm = it.update(padded(data, data["mb_rows"][step - 1]), rates[step - 1])
        note("losses", loss / data["mb_loss"][step - 1] - 1)
        note("gradient norms", norm / data["grad_norm"][step - 1] - 1)
        recorded = zip(data["grad_phase"], data["grad_step"], data["grad"], strict=True)
        for phase, number, gradient in recorded:
            if (phase, number) == ("inner", step):
                note("gradients", apart(it.gradient, gradient))
        if merges:
            with torch.no_grad():
                history = it.loss(padded(data, data["probe_rows"][step - 1])).item()
            note("probe losses", history / data["probe_loss"][step - 1] - 1)
        if step not in merges:
            continue
        merge, inner = merges.index(step), it.vector()
        note("before", apart(inner.numpy(), data["merge_theta_k"][merge]))
        for i in np.flatnonzero(data["outer_step"] == step):
            loss, _ = it.update(padded(data, data["outer_rows"][i]), rates[step])
            note("rehearsal losses", loss / data["outer_loss"][i] - 1)
        w_in, w_out = (float(data[f"merge_w_{w}"][merge]) for w in ("in", "out"))
        origin = origin + (w_in * (inner - origin) + w_out * (it.vector() - inner))
        it.write(it.parameters, origin.numpy())
        note("fused", apart(origin.numpy(), data["merge_after"][merge]))
        if start:
            break
    return {k: f"{v:.1e}" for k, v in worst.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, step, *ways = sys.argv[1:]
    for way in ways or ["float32", "float64"]:
        if way.isdigit():
            print(way, play(task, int(step), torch.float32, int(way)), flush=True)
        else:
            print(way, play(task, int(step), getattr(torch, way), None), flush=True)
