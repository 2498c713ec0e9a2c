"""The controller: against the recorded decisions of the PyTorch release, and by hand.

The recorded integers are the release's; they change only if it turns out to do something
else. None of this needs jax.
"""

import dataclasses
import json
import math
import subprocess
import sys

import golden
import pytest

from aim_jax import config, controller, methods
from aim_jax.methods import aim

PAPER = config.resolve(
    config.Config(method=aim.Options(preset="paper", interval=6, rehearsal=3))
).method
RELEASE = config.resolve(config.Config(method=aim.Options())).method


def drive(rules, history, learning=lambda step: 1.0, total=None):
    """Controllers at the merges that `history` (losses from step 1) brings about."""
    control, merges = controller.start(rules), []
    for step, loss in enumerate(history, 1):
        control = controller.observe(control, rules, step, loss)
        if controller.decide(control, rules, step, total or len(history)):
            merges.append((step, control))
            control = controller.merged(control, rules, step, learning(step))
    return merges


def test_a_probe_every_few_steps_counts_for_the_steps_between():
    """S = 8: the threshold needs 6 steps, which are 6 losses, or 2 of every third step."""
    every = dataclasses.replace(RELEASE, probe_every=3)
    control = controller.observe(controller.start(every), every, 3, 1.0)
    assert control.threshold is None
    control = controller.observe(control, every, 6, 3.0)
    assert control.threshold == 2.0 * RELEASE.threshold_factor
    control = controller.observe(control, every, 9, 100.0)
    # Of the steps that follow, those without a probe decide too.
    assert not controller.decide(control, every, 7, 100)
    assert controller.decide(control, every, 10, 100)


def steps_of(merges):
    return [step for step, _ in merges]


def test_no_jax():
    code = (
        "import sys, aim_jax.controller, aim_jax.methods.aim;"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=golden.ROOT).returncode == 0


def check(rules, history, learning, steps, merges):
    """Compare a replay with recorded states per step and per merge, exactly."""
    made = []
    for step, merged, decided, after in golden.replay(rules, history, learning):
        row = {
            "merge_flag": after.flag,
            "threshold": after.threshold or 0.0,
            "window_counter": len(after.losses),
            "S": after.interval,
            "M": after.rehearsal,
            "outer_begin": after.planned,
            "merged": merged,
        }
        assert row == {name: steps[name][step - 1] for name in row}, f"step {step}"
        if merged:
            w_in, w_out = controller.weights(decided, rules)
            assert controller.divisor(decided, rules, step) == decided.interval
            made.append(
                {
                    "step": step,
                    "S": decided.interval,
                    "M": decided.rehearsal,
                    "outer_begin": decided.planned,
                    "merge_flag": decided.flag,
                    "threshold": decided.threshold,
                    "n_window": len(decided.losses),
                    "w_in": w_in,
                    "w_out": w_out,
                    "S_next": after.interval,
                    "M_next": after.rehearsal,
                    "outer_begin_next": after.planned,
                }
            )
    assert len(made) == len(merges)
    for ours, recorded in zip(made, merges, strict=True):
        assert ours == {name: recorded[name] for name in ours}


@golden.needed
@pytest.mark.parametrize("name", golden.CONTINUAL)
def test_recorded_task(name):
    data = golden.trace(name)
    rules = golden.settings().method
    columns = ("merge_flag", "threshold", "window_counter")
    steps = {c: data[f"ctl_{c}"] for c in (*columns, "S", "M", "outer_begin", "merged")}
    if "probe_loss" not in data:
        # No memory, no controller: the release leaves its first state where it is.
        first = controller.start(rules)
        assert not steps["merged"].any()
        assert set(steps["S"]) == {first.interval} and set(steps["M"]) == {
            first.rehearsal
        }
        assert set(steps["outer_begin"]) == {first.planned}
        return
    names = {
        "merge_flag": "flag",
        **{
            n: n
            for n in ("step", "S", "M", "outer_begin", "threshold", "n_window")
            + ("w_in", "w_out", "S_next", "M_next", "outer_begin_next")
        },
    }
    merges = [
        {ours: data[f"merge_{theirs}"][i] for ours, theirs in names.items()}
        for i in range(len(data["merge_step"]))
    ]
    check(rules, data["probe_loss"], data["merge_l1"], steps, merges)


SCRIPTED = golden.read("controller_traces.json.gz") if golden.FOLDER.is_dir() else []


@golden.needed
@pytest.mark.parametrize("case", SCRIPTED, ids=lambda case: case["name"])
def test_scripted_trace(case):
    rules = config.resolve(config.Config(method=golden.options(case["hyper"]))).method
    merges = case["merges"]
    learning = [merge["l1"] for merge in merges]
    check(rules, case["probe_loss"], learning, case["steps"], merges)
    # What the release executed is what it planned.
    assert [m["n_outer"] for m in merges] == [m["M"] for m in merges]


def test_threshold_is_a_factor_times_the_mean_of_the_first_two_thirds():
    rules = dataclasses.replace(RELEASE, interval=6, threshold_factor=2.0)
    control = controller.start(rules)
    for step, loss in enumerate([1.0, 2.0, 3.0, 4.0], 1):
        control = controller.observe(control, rules, step, loss)
        assert control.losses == (1.0, 2.0, 3.0, 4.0)[:step]
        assert control.threshold == (5.0 if step == 5 else None)
    # int(2 * 6 / 3) + 1 losses, and no comparison on the step that sets the threshold.
    control = controller.observe(control, rules, 5, 100.0)
    assert control.threshold == 2 * 110 / 5 and control.flag == 0
    assert controller.observe(control, rules, 6, 44.0).flag == 1  # reaching it counts
    assert controller.observe(control, rules, 6, 43.9).flag == 0


def test_calm_task_merges_when_an_interval_is_overdue():
    merges = drive(RELEASE, [1.0] * 40)
    assert steps_of(merges) == [16, 32]
    assert all(m.forced and m.flag == 1 for _, m in merges)
    # Two intervals of 8 at most: planned at 8, forced at 8 + 8.
    assert [m.planned for _, m in merges] == [8, 24]


def test_one_exceedance_arms_the_planned_step_and_three_do_not_wait():
    losses = [1.0] * 6 + [9.0] + [1.0] * 9
    assert steps_of(drive(RELEASE, losses)) == [8]
    losses = [1.0] * 10 + [9.0] + [1.0] * 5
    assert steps_of(drive(RELEASE, losses)) == [11]
    long = dataclasses.replace(RELEASE, interval=30)
    losses = [1.0] * 22 + [9.0, 1.0, 9.0, 9.0] + [1.0] * 9
    [(step, control)] = drive(long, losses)
    assert (step, control.flag, control.forced) == (26, 3, False)


@pytest.mark.parametrize(
    "flag, interval, expected",
    [
        (1, 70, (0.6, 0.4)),
        (1, 71, (0.5, 0.5)),
        (2, 70, (0.5, 0.5)),
        (2, 71, (0.4, 0.6)),
    ],
)
def test_fusion_weights(flag, interval, expected):
    control = controller.Controller(interval, 8, 8, flag=flag)
    assert controller.weights(control, RELEASE) == expected
    equal = dataclasses.replace(RELEASE, equal_weights=True)
    assert controller.weights(control, equal) == (0.5, 0.5)


@pytest.mark.parametrize(
    "interval, previous, now, expected",
    [
        (8, 1.0, 2.0, 4),  # faster: merge more often
        (8, 1.0, 1.0, 8),
        (8, 1.0, 3.0, 2),  # rounded down
        (3, 1.0, 2.0, 2),  # not below min_interval
        (91, 1.0, 1.0, 45),  # 64 and more is halved
        (128, 1.0, 2.0, 32),
        (8, 2.0, 1.0, 24),  # slower: S (p/b + 1)
        (70, 1.5, 1.0, 128),  # S (p/b + 0.5), and not above max_interval
        (64, 1.0, 0.99, 96),
        (8, 0.0, 1.0, 8),  # nothing moved before
        (8, 1.0, 0.0, 128),  # nothing moves now
    ],
)
def test_released_interval(interval, previous, now, expected):
    control = controller.Controller(interval, 8, 8, learning=(9.0, 9.0, 9.0, previous))
    after = controller.merged(control, RELEASE, 50, now)
    assert after.interval == after.rehearsal == expected
    assert after.planned == 50 + expected
    assert after.learning == (9.0, 9.0, 9.0, previous, now)
    assert (after.last, after.flag, after.losses, after.threshold) == (50, 0, (), None)


def test_cold_start_leaves_one_merge_more_than_it_says():
    for merges in range(4):
        control = controller.Controller(8, 8, 8, learning=(1.0,) * merges)
        assert controller.merged(control, RELEASE, 8, 2.0).interval == 8
    control = controller.Controller(8, 8, 8, learning=(1.0,) * 4)
    assert controller.merged(control, RELEASE, 8, 2.0).interval == 4


def test_rehearsal_keeps_its_ratio_to_the_interval_and_may_be_none():
    rules = dataclasses.replace(RELEASE, interval=12, rehearsal=5, cold_start=0)
    control = controller.Controller(12, 5, 12, learning=(1.0,))
    assert controller.merged(control, rules, 12, 2.0).rehearsal == int(6 * 5 / 12)
    assert controller.merged(control, rules, 12, 9.0).rehearsal == int(2 * 5 / 12) == 0


def test_interval_of_one_step():
    rules = dataclasses.replace(RELEASE, interval=1, rehearsal=1, min_interval=1)
    # One loss makes the threshold; the next may reach it.
    merges = drive(rules, [1.0, 9.0, 1.0, 9.0, 1.0, 1.0])
    assert steps_of(merges) == [2, 4, 6]
    assert [len(m.losses) for _, m in merges] == [1, 1, 1]


def test_paper_divides_by_the_steps_taken():
    control = controller.Controller(8, 8, 28, last=20)
    assert controller.divisor(control, PAPER, 31) == 11
    assert controller.divisor(control, RELEASE, 31) == 8
    assert controller.divisor(controller.start(PAPER), PAPER, 31) == 31


@pytest.mark.parametrize(
    "learning, now, expected",
    [
        ((1.0, 2.0, 3.0, 4.0), 5.0, 3),  # rising: S / 2
        ((5.0, 4.0, 3.0, 2.0), 1.0, 12),  # falling: 2 S
        ((9.0, 1.0, 2.0, 3.0), 1.0, 3),  # two rises, one fall within the window
        ((9.0, 3.0, 2.0, 1.0), 3.0, 12),  # the fall from 9 is out of the window of 3
        ((1.0, 1.0, 1.0, 1.0), 1.0, 6),  # neither
        ((9.0, 1.0, 2.0, 1.0), 1.0, 6),  # as many rises as falls
    ],
)
def test_paper_follows_the_trend_in_a_window(learning, now, expected):
    control = controller.Controller(6, 3, 6, learning=learning)
    after = controller.merged(control, PAPER, 40, now)
    assert after.interval == expected
    assert after.rehearsal == int(expected * 3 / 6)


def test_paper_interval_stays_within_its_limits():
    rules = dataclasses.replace(PAPER, min_interval=5, max_interval=9)
    control = controller.Controller(6, 3, 6, learning=(1.0, 2.0, 3.0, 4.0))
    assert controller.merged(control, rules, 40, 5.0).interval == 5
    falling = dataclasses.replace(control, learning=(4.0, 3.0, 2.0, 1.0))
    assert controller.merged(falling, rules, 40, 0.0).interval == 9
    rules = dataclasses.replace(PAPER, grow=math.inf)
    assert controller.merged(falling, rules, 40, 0.0).interval == PAPER.max_interval
    rules = dataclasses.replace(PAPER, shrink=1.6, grow=3.3)
    assert controller.merged(control, rules, 40, 5.0).interval == int(6 / 1.6) == 3
    assert controller.merged(falling, rules, 40, 0.0).interval == int(6 * 3.3) == 19


def test_without_learning_signal_the_interval_is_fixed():
    rules = dataclasses.replace(RELEASE, learning_signal=False, cold_start=0)
    merges = drive(rules, [1.0] * 160, learning=lambda step: 1.0 / step)
    assert len(merges) == 10
    assert {(m.interval, m.rehearsal) for _, m in merges} == {(8, 8)}


def test_without_forgetting_signal_merges_come_as_planned():
    rules = dataclasses.replace(RELEASE, forgetting_signal=False, cold_start=0)
    losses = [1.0] * 6 + [99.0, 99.0, 99.0] + [1.0] * 31
    merges = drive(rules, losses, learning=lambda step: 1.0 / step)
    assert [m.planned for _, m in merges] == steps_of(merges)
    # 8, then 8 (nothing to compare with), then S (p/b + 1) with p/b = 16/8.
    assert steps_of(merges)[:3] == [8, 16, 40]
    calm = drive(rules, [1.0] * 40, learning=lambda step: 1.0 / step)
    assert steps_of(calm) == steps_of(merges)


def test_one_merge_at_the_end():
    rules = dataclasses.replace(RELEASE, merge_at_end=True)
    losses = [1.0, 9.0] * 20
    assert steps_of(drive(rules, losses)) == [40]
    assert steps_of(drive(rules, losses, total=41)) == []


def test_no_rehearsal():
    rules = dataclasses.replace(RELEASE, rehearsal=0, cold_start=0)
    merges = drive(rules, [1.0] * 99, learning=lambda step: 1.0 / step)
    assert len(merges) > 2
    assert {m.rehearsal for _, m in merges} == {0}


def test_a_loss_that_is_no_number_never_counts_as_forgetting():
    # NaN reaches no threshold, and no threshold of NaN is reached: the merge is forced.
    for losses in ([1.0] * 6 + [math.nan] * 10, [math.nan] * 16):
        [(step, control)] = drive(RELEASE, losses)
        assert (step, control.forced) == (16, True)


def test_json_round_trip():
    history = [1.0, 3.0, 2.0] * 20
    control = controller.start(RELEASE)
    for step, loss in enumerate(history, 1):
        data = json.loads(json.dumps(dataclasses.asdict(control)))
        copy = methods.revive(controller.start(RELEASE), data)
        assert copy == control
        control = controller.observe(control, RELEASE, step, loss)
        if controller.decide(control, RELEASE, step, len(history)):
            control = controller.merged(control, RELEASE, step, 1 / 3)
    assert control.learning
