"""AdamW with a traced weight decay: one compiled update serves the whole grid, λ = 0 included."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from plasticity_jax.errors import UserError
from plasticity_jax.parallel.rules import match_rules, param_paths

Params = Any  # nested dict of arrays, layers stacked on axis 0

_NORMS = r"(^|.*/)[a-z_]*norm/scale"
_INPUT_EMBEDDING = r"embed/embedding"

# preset -> ordered (regex over the parameter path, decayed?, may the pattern match nothing?)
DECAY_PRESETS: dict[str, tuple[tuple[str, bool, bool], ...]] = {
    "all": ((r".*", True, False),),
    "olmo": ((_INPUT_EMBEDDING, False, False), (r".*", True, False)),
    "matrices-only": ((_INPUT_EMBEDDING, False, False), (_NORMS, False, True), (r".*", True, False)),
    "no-norms": ((_NORMS, False, True), (r".*", True, False)),
}


@dataclass(frozen=True)
class Schedule:
    """The learning-rate schedule after the linear warmup.

    Attributes:
      kind: "cosine" (to the end of the run) or "wsd" (a plateau, then linear decay).
      final_fraction: learning rate after the last step, as a fraction of the peak.
      decay_fraction: fraction of the steps in the linear decay of "wsd"; a cosine takes all steps after the warmup.
    """

    kind: str
    final_fraction: float
    decay_fraction: float


@dataclass(frozen=True)
class OptimizerSettings:
    """Static settings of the update. Values that vary over runs are traced hyperparameters (see `step.hyper_parameters`).

    Attributes:
      b1, b2, eps: of Adam.
      clip_norm: maximum global norm of the gradient.
      schedule: see `Schedule`.
      decay_kind: "coupled" (PyTorch: decay times learning rate) or "independent" (decay times the schedule's shape).
      decay_mask: one of DECAY_PRESETS.
    """

    b1: float
    b2: float
    eps: float
    clip_norm: float
    schedule: Schedule
    decay_kind: str
    decay_mask: str

    @classmethod
    def of(cls, section: Any, **settings: Any) -> "OptimizerSettings":
        """The settings of a config section: its fields of the same names, and `settings` for the others."""
        shared = {field.name for field in dataclasses.fields(cls)} - settings.keys()
        return cls(**{name: getattr(section, name) for name in shared if hasattr(section, name)}, **settings)


def warmup_steps(steps: int, fraction: float) -> int:
    """Steps of the linear warmup: `fraction` of the run, at least one."""
    return max(1, round(fraction * steps))


def schedule_shape(step: Int[Array, "*steps"], *, warmup: Float[Array, ""], total: Float[Array, ""], schedule: Schedule) -> Float[Array, "*steps"]:
    """Learning rate as a fraction of its peak: linear warmup, then decay to the final fraction.

    Steps count from 0, and the update of step s uses the value at s: 0 at the first update, 1 at s = warmup, and the final fraction at s = total, just
    after the last update. So the first update only fills Adam's moments.

    Args:
      step: index of the update, from 0.
      warmup: warmup steps, at least 1.
      total: steps of the run.
    Source: the study's `get_lr` (paper section 3.2: lr = peak * it/warmup, evaluated before the counter advances); warmup, stable, decay of
      Hu et al. 2024 (arXiv 2404.06395) with a linear end.
    """
    step = jnp.asarray(step, float)
    begin = warmup if schedule.kind == "cosine" else jnp.maximum(total * (1.0 - schedule.decay_fraction), warmup)
    progress = jnp.clip((step - begin) / jnp.maximum(total - begin, 1.0), 0.0, 1.0)
    left = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return jnp.where(step < warmup, step / warmup, schedule.final_fraction + (1.0 - schedule.final_fraction) * left)


def decay_table(params: Params, preset: str) -> dict[str, bool]:
    """Which parameters weight decay applies to.

    Presets: "all" (the study's Llama runs: norms, embedding and head too), "olmo" (all but the input embedding), "matrices-only" (only matrices
    that multiply activations: neither norms nor the input embedding) and "no-norms" (all but norms, as the Hugging Face Trainer does in
    fine-tuning).

    Args:
      params: nested dict of arrays or of `jax.ShapeDtypeStruct`.
      preset: one of the above.
    Returns:
      Parameter path such as "blocks/attn/q/kernel" → decayed or not, for every parameter.
    Raises:
      UserError: unknown preset.
      ValueError: a pattern of the preset matches no parameter, as for a tree that is not a decoder's.
    Source: paper section 3.3.
    """
    if preset not in DECAY_PRESETS:
        raise UserError(f"decay mask {preset!r} is unknown; use one of {', '.join(DECAY_PRESETS)}.")
    return match_rules(DECAY_PRESETS[preset], params)


class _DecayState(NamedTuple):
    count: Int[Array, ""]


def _decay_and_scale(settings: OptimizerSettings) -> optax.GradientTransformationExtraArgs:
    def init(params: Params) -> _DecayState:
        return _DecayState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, *, hyper, **_):
        shape = schedule_shape(state.count, warmup=hyper["warmup_steps"], total=hyper["total_steps"], schedule=settings.schedule)
        rate = hyper["peak_lr"] * shape
        shrink = (rate if settings.decay_kind == "coupled" else shape) * hyper["weight_decay"]
        table = decay_table(params, settings.decay_mask)
        leaves, tree = jax.tree.flatten(params)
        decayed = tree.unflatten([table[path] for path in param_paths(params)])
        # The term stays for λ = 0: without it the program would be different and round differently.
        scaled = jax.tree.map(lambda u, p, d: -rate * u - shrink * p if d else -rate * u, updates, params, decayed)
        return scaled, _DecayState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformationExtraArgs:
    """AdamW: gradient clipping, Adam's direction m̂/(√v̂ + ε), weight decay and the learning rate.

    With lr_t = peak · shape_t, the change of a decayed parameter θ is −lr_t m̂/(√v̂ + ε) − lr_t λ θ ("coupled", PyTorch and the study) or
    −lr_t m̂/(√v̂ + ε) − shape_t λ θ ("independent"). `update` takes the traced hyperparameters as `hyper=` (see `step.hyper_parameters`). The
    chain and its state are the same for every λ.

    Source: Loshchilov & Hutter, arXiv 1711.05101; paper section 1.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
        _decay_and_scale(settings),
    )


def timescale_steps(weight_decay: float, peak_lr: float, kind: str) -> float | None:
    """AdamW's timescale at the peak learning rate, in steps: 1/(lr λ), or 1/λ with independent decay; None without decay.

    Source: Wang & Aitchison, arXiv 2405.13698.
    """
    per_step = weight_decay * (peak_lr if kind == "coupled" else 1.0)
    return 1.0 / per_step if per_step > 0 else None
