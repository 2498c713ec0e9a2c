"""FOREVER: rehearsal on a forgetting curve whose clock is how far the adapter has moved.

Delta_t = |theta_t - theta_{t-1}|_2, and the clock tau sums it up, from 0 at each task. The
first S steps set the length of a day, tau_day = tau_S, and a speed mu_0 = tau_S / S. Some
steps on the memory follow when tau reaches 1, 2, 4, 7, 15, 30 days (then twice as many
each time), their loss being

    loss + beta_t * |theta - theta*|^2,   beta_t = beta * clip(1 + gamma (mu_t / mu_0 - 1))

with theta* the adapter before the task and mu_t = 0.95 mu_{t-1} + 0.05 Delta_t the speed.
Source: FOREVER (arXiv 2601.03938), as third parties sum it up. It leaves open gamma, the
steps of a rehearsal and how the days go on.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import aim_jax
from aim_jax import methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """Constants of FOREVER."""

    name: str = "forever"
    calibration: int = 24  # S, the steps of the first day
    days: tuple[int, ...] = (1, 2, 4, 7, 15, 30)
    rehearsal: int = 8  # steps on the memory each time
    beta: float = 1e-3
    gamma: float = 1.0
    least: float = 0.5  # of beta_t / beta
    most: float = 3.0
    smoothing: float = 0.05


@dataclasses.dataclass(frozen=True)
class Clock:
    """tau, tau_day, mu_0, mu_t, and how many rehearsals there were in this task."""

    time: float = 0.0
    day: float = 0.0
    first_speed: float = 0.0
    speed: float = 0.0
    rehearsals: int = 0


def make(options: Options) -> methods.Method:
    """The method whose clock is the adapter's path."""
    return scheduled(options, lambda signals: signals.distance)


def scheduled(options: Options, tick) -> methods.Method:
    """Rehearsal on a clock that `tick(signals)` moves on.

    Raises InputError for days that do not come one after another.
    """
    if not options.days or any(
        b <= a for a, b in itertools.pairwise((0, *options.days))
    ):
        raise aim_jax.InputError(f"method.days: {options.days} must be days that rise")

    def start(delta, tasks):
        return methods.Memo({"anchor": delta, "beta": jnp.float32(0)}, Clock())

    def before_task(tools, state, memo):
        arrays = memo.arrays | {"anchor": state.delta}
        return state, methods.Memo(arrays, Clock())

    def rehearsal_penalty(delta, arrays):
        away = jax.tree.map(jnp.subtract, delta, arrays["anchor"])
        return arrays["beta"] * optax.tree.norm(away, squared=True)

    def after_step(tools, state, memo, signals):
        clock = advance(memo.host, options, signals.step, tick(signals))
        if tools.remembered and due(clock, options):
            arrays = memo.arrays | {"beta": np.float32(strength(clock, options))}
            state, _ = tools.rehearse(
                state, memo._replace(arrays=arrays), signals.step, options.rehearsal
            )
            clock = dataclasses.replace(clock, rehearsals=clock.rehearsals + 1)
        return state, memo._replace(host=clock), None

    return methods.Method(
        memory=True,
        start=start,
        rehearsal_penalty=rehearsal_penalty,
        before_task=before_task,
        after_step=after_step,
    )


def advance(clock: Clock, options: Options, step: int, distance: float) -> Clock:
    """The clock after a step; the last step of the first day sets day and speed."""
    time = clock.time + distance
    if step < options.calibration:
        return dataclasses.replace(clock, time=time)
    if step == options.calibration:
        speed = time / step
        return dataclasses.replace(
            clock, time=time, day=time, first_speed=speed, speed=speed
        )
    speed = (1 - options.smoothing) * clock.speed + options.smoothing * distance
    return dataclasses.replace(clock, time=time, speed=speed)


def due(clock: Clock, options: Options) -> bool:
    """Whether the day of the next rehearsal has come; none comes in the first day."""
    more = clock.rehearsals - len(options.days) + 1
    days = options.days[-1] * 2**more if more > 0 else options.days[clock.rehearsals]
    return clock.day > 0 and clock.time >= days * clock.day


def strength(clock: Clock, options: Options) -> float:
    """beta_t."""
    ratio = 1 + options.gamma * (clock.speed / clock.first_speed - 1)
    return options.beta * min(max(ratio, options.least), options.most)
