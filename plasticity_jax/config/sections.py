"""The config sections of the analyses, the reward and the verifier."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen

from plasticity_jax.config.schema import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    ProperFraction,
    StudyConfig,
    check_choice,
    execution,
    result,
)
from plasticity_jax.errors import UserError

ZeroShotSet = Literal["hellaswag", "winogrande", "piqa", "openbookqa", "arc_easy", "arc_challenge"]


@dataclass(frozen=True)
class RewardConfig:
    """What chooses among sampled completions (RM@n) and rates them (ORM score); the report names it."""

    scorer: Literal["none", "log-probability", "verifier", "sequence-classification"] = result(
        "none", "none | log-probability (per token) | verifier (trained by this study) | sequence-classification (a Hugging Face reward model)"
    )
    model: str | None = result(None, "log-probability: a run or Hugging Face folder, None: the model that wrote; sequence-classification: a folder")
    max_length: PositiveInt = result(2048, "tokens of problem and completion; longer ones lose their beginning")
    batch_size: PositiveInt = execution(64, "completions scored at once")

    def check(self, config: StudyConfig) -> None:
        from plasticity_jax.data.tasks import TASKS

        if self.model is not None and self.scorer not in ("log-probability", "sequence-classification"):
            raise UserError(f"reward.model={self.model} has no effect with reward.scorer={self.scorer!r}; leave it out.")
        if self.model is None and self.scorer == "sequence-classification":
            raise UserError("reward.scorer='sequence-classification' needs reward.model, the folder of a Hugging Face reward model.")
        for name, settings in config.tasks.items():
            if self.scorer == "verifier" and not settings.verifier_rows and TASKS[name].grader != "likelihood":
                raise UserError(f"reward.scorer='verifier' needs rows of its own in every task; set tasks.{name}.verifier_rows, such as 200.")


@dataclass(frozen=True)
class VerifierConfig:
    """The outcome verifier: per task, a fine-tuned model with a scalar head, trained on graded samples of rows kept for it (`tasks.<name>.verifier_rows`)."""

    n_samples: PositiveInt = result(4, "samples per row and member")
    epochs: PositiveInt = result(3, "passes over the samples")
    peak_lr: PositiveFloat = result(1e-3, "learning rate after the warm-up")
    batch_size: PositiveInt = result(64, "samples per step")
    warmup_fraction: Fraction = result(0.1, "fraction of the steps")
    held_out_fraction: ProperFraction = result(0.2, "fraction of the rows, for the AUC that is reported; 0.2 is usual")
    seed: int = result(0, "seed of the split, the scalar head and the order of the samples")


@dataclass(frozen=True)
class ZeroShotConfig:
    """The zero-shot suite before and after fine-tuning (forgetting), by lm-evaluation-harness: needs the extra `harness`."""

    sets: tuple[ZeroShotSet, ...] = result((), "hellaswag, winogrande, piqa, openbookqa, arc_easy, arc_challenge")
    limit: PositiveInt | None = result(None, "examples per set, from the beginning; None takes all")
    batch_size: PositiveInt = execution(64, "examples scored at once")


@dataclass(frozen=True)
class ProbeConfig:
    """Linear probes on last-token states at every layer."""

    sets: tuple[str, ...] = result(("sentiment", "topic"), "sets of labeled texts")
    train_rows: PositiveInt = result(2000, "training texts per set")
    test_rows: PositiveInt = result(800, "test texts per set")
    max_length: PositiveInt = result(128, "tokens; a longer text loses its end")
    l2: Annotated[tuple[NonNegativeFloat, ...], MinLen(1)] = result((1e-4, 1e-3, 1e-2, 1e-1), "candidate penalties, chosen on a validation split")
    seed: int = result(0, "seed of the splits")

    def check(self, config: StudyConfig) -> None:
        from plasticity_jax.data.probe_sets import PROBE_SETS

        for i, name in enumerate(self.sets):
            check_choice(f"probe.sets[{i}]", name, PROBE_SETS)


@dataclass(frozen=True)
class SpectraConfig:
    """Singular values of the attention products W_QK and W_VO."""

    mass: PositiveFraction = result(0.95, "fraction of the sum that the leading singular values must reach")
    power: Annotated[int, Ge(1), Le(2)] = result(1, "1: sum of the values | 2: sum of their squares")
    fold_norms: bool = result(False, "multiply the input norm's gain into the factors")


@dataclass(frozen=True)
class GapConfig:
    """Loss on text seen in training against held-out text, on equal tokens per domain."""

    tokens_per_side: PositiveInt = result(65536, "tokens per domain, seen and held out each")
    seed: int = result(0, "seed of the choice of records")

    def check(self, config: StudyConfig) -> None:
        if self.tokens_per_side < config.train.seq_len:
            raise UserError(f"gap.tokens_per_side={self.tokens_per_side} is below train.seq_len={config.train.seq_len}, one sequence; raise it.")


SECTIONS = {
    "reward": RewardConfig,
    "verifier": VerifierConfig,
    "zero_shot": ZeroShotConfig,
    "probe": ProbeConfig,
    "spectra": SpectraConfig,
    "gap": GapConfig,
}
