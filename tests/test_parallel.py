"""pmap and jit over four devices give what one device gives."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys
import jax, numpy as np
from aim_jax import config, lora, parallel, steps
from aim_jax.data import batches, synthetic
from aim_jax.models import hf

cfg = config.resolve(config.Config(
    train=config.Train(batch_size=8, micro_batch_size=4, warmup_steps=2),
    lora=config.Lora(dropout=0.0),
))
devices = parallel.open_devices(sys.argv[1])
base = hf.load(cfg.model, devices.replicated)
text = batches.Text(batches.tokenizer(hf.ASSETS), "encdec", cfg.data, devices.count)
rows = batches.encode(text, synthetic.task("topic", 0, 20, 0, 0)["train"])
pure = steps.make(base.model, cfg)
train = parallel.compile(pure.train, devices, batch=3, args=4)
rehearse = parallel.compile(pure.rehearse, devices, batch=2, args=4)
probe = parallel.compile(pure.probe, devices, batch=2, args=3)
delta = lora.init(jax.random.key(0), base.params, base.keys, cfg.lora)
state = jax.device_put(steps.init(delta, 20, jax.random.key(1)), devices.replicated)
losses = []
for step in range(20):
    chosen = [[rows[i] for i in m]
              for m in batches.step_rows(len(rows), cfg.train, (0, 1), step + 1)]
    batch = parallel.place(batches.collate(text, chosen, 4, "micro_batch"), devices)
    state, measures = train(base.params, state, (), batch)
    losses.append(float(measures["loss"]))
memory = parallel.place(batches.collate(text, [rows[:5]] * 3, 5), devices)
losses.append(float(probe(base.params, state, memory)))
state, rehearsed = rehearse(base.params, state, memory, 2)
losses += np.asarray(rehearsed).tolist()
norm = float(sum(np.square(np.asarray(x, np.float64)).sum()
                 for x in jax.tree.leaves(state.delta)))
print(json.dumps({"devices": devices.count, "losses": losses, "norm": norm}))
"""


def result(mode, devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["devices"] == devices
    return made


def test_four_devices_agree_with_one():
    # The sums run in another order, and 20 steps amplify the rounding.
    one = result("jit", 1)
    for mode in ("pmap", "jit"):
        four = result(mode, 4)
        assert four["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert four["norm"] == pytest.approx(one["norm"], rel=1e-6)
