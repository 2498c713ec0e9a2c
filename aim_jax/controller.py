"""The merge controller: when to merge, how long to rehearse, with which weights.

Plain Python that runs on the host between steps. A frozen `Controller` goes in, a new one
comes out. The numbers and rules of trend `ratio` with divisor `planned` are those of the
PyTorch release (semantics.md 3.3-3.9); trend `window` with divisor `taken` follows the
paper's description (arXiv 2509.17348, section 3).
"""

import dataclasses
from typing import Protocol


class Rules(Protocol):
    """The constants of the controller: the fields of `methods.aim.Options` it reads."""

    interval: int
    rehearsal: int
    cold_start: int
    min_interval: int
    max_interval: int
    threshold_factor: float
    long_interval: int
    halve_at: int
    learning_signal: bool
    forgetting_signal: bool
    equal_weights: bool
    merge_at_end: bool
    divisor: str
    trend: str
    window: int
    shrink: float
    grow: float
    probe_every: int


@dataclasses.dataclass(frozen=True)
class Controller:
    """State inside one task; JSON-able.

    interval: S, steps planned between merges; rehearsal: M, memory steps of a merge;
    planned: G, the step from which one exceedance merges; last: step of the last merge;
    flag: f, exceedances of the threshold; losses: probe losses that will make the
    threshold; learning: learning signals of the merges so far.
    """

    interval: int
    rehearsal: int
    planned: int
    last: int = 0
    flag: int = 0
    forced: bool = False
    threshold: float | None = None
    losses: tuple[float, ...] = ()
    learning: tuple[float, ...] = ()


def start(rules: Rules) -> Controller:
    """The controller at the start of a task."""
    return Controller(rules.interval, rules.rehearsal, planned=rules.interval)


def observe(control: Controller, rules: Rules, step: int, history: float) -> Controller:
    """The controller after the memory loss `history` of `step` (3.3).

    The losses of the first int(2S/3) + 1 steps of an interval make the threshold; later
    ones are counted when they reach it. A merge is forced when none did until G + S.
    """
    if control.threshold is None:
        losses = (*control.losses, history)
        threshold = None
        if len(losses) * rules.probe_every > int(control.interval * 2 / 3):
            threshold = rules.threshold_factor * (sum(losses) / len(losses))
        return dataclasses.replace(control, losses=losses, threshold=threshold)
    if history >= control.threshold:
        return dataclasses.replace(control, flag=control.flag + 1)
    if step >= control.planned + control.interval:
        return dataclasses.replace(control, flag=control.flag + 1, forced=True)
    return control


def decide(control: Controller, rules: Rules, step: int, total: int) -> bool:
    """Whether to merge after `step` of `total` (3.4)."""
    if rules.merge_at_end:
        return step == total
    if not rules.forgetting_signal:
        return step >= control.planned
    return control.flag >= 3 or (step >= control.planned and control.flag >= 1)


def weights(control: Controller, rules: Rules) -> tuple[float, float]:
    """Fusion weights (inner, rehearsal) of a merge now (3.7)."""
    if rules.equal_weights:
        return 0.5, 0.5
    long = control.interval > rules.long_interval
    if control.flag > 1:
        return (0.4, 0.6) if long else (0.5, 0.5)
    return (0.5, 0.5) if long else (0.6, 0.4)


def divisor(control: Controller, rules: Rules, step: int) -> int:
    """Steps by which the movement of a merge at `step` is divided (3.8)."""
    return step - control.last if rules.divisor == "taken" else control.interval


def merged(control: Controller, rules: Rules, step: int, learning: float) -> Controller:
    """The controller after a merge at `step` with learning signal `learning` (3.9)."""
    interval, rehearsal = control.interval, control.rehearsal
    if rules.learning_signal and len(control.learning) > rules.cold_start:
        adapt = _window if rules.trend == "window" else _ratio
        interval = adapt(control, rules, learning)
        rehearsal = int(interval * (rules.rehearsal / rules.interval))
    return Controller(
        interval,
        rehearsal,
        planned=step + interval,
        last=step,
        learning=(*control.learning, learning),
    )


def _ratio(control: Controller, rules: Rules, learning: float) -> int:
    """The next interval as released: by the change since the previous merge alone."""
    interval, previous = control.interval, control.learning[-1]
    if learning >= previous:
        change = learning / previous if previous else 1.0
        interval = max(rules.min_interval, int(interval / change))
        return int(interval / 2) if interval >= rules.halve_at else interval
    extra = 1 if interval < rules.halve_at else 0.5
    # No movement at all asks for the longest interval.
    change = previous / learning if learning else rules.max_interval
    return min(rules.max_interval, int(interval * (change + extra)))


def _window(control: Controller, rules: Rules, learning: float) -> int:
    """The next interval as the paper describes: by the dominant trend in a window."""
    recent = (*control.learning, learning)[-rules.window - 1 :]
    rises = sum(b > a for a, b in zip(recent, recent[1:], strict=False))
    falls = sum(b < a for a, b in zip(recent, recent[1:], strict=False))
    if rises > falls:
        return max(rules.min_interval, int(control.interval / rules.shrink))
    if falls > rises:
        return int(min(rules.max_interval, control.interval * rules.grow))
    return control.interval
