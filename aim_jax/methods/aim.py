"""AimMerging: adaptive iterative merging of new and rehearsed knowledge.

Source: Feng et al., EMNLP 2025 (arXiv 2509.17348). After every step the loss on a memory
batch (forgetting signal) goes to the controller. When it calls for a merge, some steps on
the memory give a second delta, and the adapter becomes

    theta_0 + w_in * (theta_k - theta_0) + w_out * (theta_out - theta_k),

theta_0 the last merge point, theta_k the adapter now, theta_out after rehearsal. How far
theta_k moved per step (learning signal) sets the next interval.
"""

import dataclasses

from aim_jax import controller, methods


@dataclasses.dataclass(frozen=True)
class Options(methods.Options):
    """Constants of AimMerging; None: as the preset says."""

    name: str = "aim"
    interval: int = 8  # S at the start of a task
    rehearsal: int = 8  # M at the start of a task
    cold_start: int = 3  # merges before the interval adapts, less one
    min_interval: int = 2
    max_interval: int = 128
    threshold_factor: float = 2.0
    long_interval: int = 70  # above it the rehearsal delta weighs more
    halve_at: int = 64  # a non-falling signal halves an interval this long
    # Ablations.
    learning_signal: bool = True  # False: the interval never changes
    forgetting_signal: bool = True  # False: merge at the planned step
    equal_weights: bool = False
    # One merge, at the end of a task, which rehearses at the rate of the task's middle.
    merge_at_end: bool = False
    # Where the released code and the paper part.
    divisor: str | None = None  # `planned` or `taken` steps divide the movement
    trend: str | None = None  # `ratio` to the last merge, or a `window` of them
    window: int = 3  # merges that a trend is read from
    shrink: float = 2.0  # divides the interval when learning speeds up
    grow: float = 2.0  # multiplies it when learning slows down
    probe_dropout: bool | None = None
    probe_every: int = 1  # steps from one forgetting signal to the next
    loss_scale: str | None = None  # memory losses over `accumulation` steps, or `mean`


def make(options: Options) -> methods.Method:
    """The hooks of AimMerging."""

    def start(delta, tasks):
        return methods.Memo({"origin": delta}, controller.start(options))

    def before_task(tools, state, memo):
        return state, methods.Memo({"origin": state.delta}, controller.start(options))

    def after_step(tools, state, memo, signals):
        if not tools.remembered:
            return state, memo, None
        step, control = signals.step, memo.host
        if signals.history is not None:
            control = controller.observe(control, options, step, signals.history)
        if not controller.decide(control, options, step, signals.total):
            return state, memo._replace(host=control), None
        begun = state
        if options.merge_at_end:
            # The schedule has come to 0, at which rehearsal would change nothing.
            begun = state._replace(step=state.total // 2)
        rehearsed, losses = tools.rehearse(begun, memo, step, control.rehearsal)
        w_in, w_out = controller.weights(control, options)
        fused, motion = tools.fuse(
            memo.arrays["origin"], state.delta, rehearsed.delta, w_in, w_out
        )
        learning = float(motion) / controller.divisor(control, options, step)
        following = controller.merged(control, options, step, learning)
        record = {
            "interval": control.interval,
            "rehearsal": control.rehearsal,
            "planned": control.planned,
            "flag": control.flag,
            "forced": control.forced,
            "history": signals.history,
            "threshold": control.threshold,
            "window": len(control.losses),
            "weights": [w_in, w_out],
            "learning": learning,
            "rehearsal_loss": [losses[0], losses[-1]] if losses else [],
            "next_interval": following.interval,
            "next_rehearsal": following.rehearsal,
            "next_planned": following.planned,
        }
        return (
            rehearsed._replace(delta=fused, step=state.step),
            methods.Memo({"origin": fused}, following),
            record,
        )

    def status(memo):
        control = memo.host
        return {
            "interval": control.interval,
            "planned": control.planned,
            "flag": control.flag,
            "threshold": control.threshold,
        }

    return methods.Method(
        memory=True,
        probe=options.probe_every,
        probe_dropout=bool(options.probe_dropout),
        start=start,
        before_task=before_task,
        after_step=after_step,
        status=status,
    )
