"""Checks of what follows pretraining: tasks, fine-tuning, evaluation, rewards, analyses."""

from plasticity_jax.config.rules import check_choice, check_fraction, check_positive, refuse_unless
from plasticity_jax.config.schema import StudyConfig

ZERO_SHOT_SETS = ("hellaswag", "winogrande", "piqa", "openbookqa", "arc_easy", "arc_challenge")  # of evaluate.zero_shot, which imports jax


def check_downstream(config: StudyConfig) -> None:
    for name, settings in config.tasks.items():
        for key in ("train_rows", "test_rows", "epochs", "max_new_tokens"):
            check_positive(f"tasks.{name}.{key}", getattr(settings, key))
        refuse_unless(settings.verifier_rows >= 0, f"tasks.{name}.verifier_rows={settings.verifier_rows} must not be negative.")
        _check_task_files(name, settings.files)
    tune = config.finetune
    for name in ("peak_lr", "batch_size", "eps", "clip_norm", "log_every", "checkpoint_every", "grad_accum_steps"):
        check_positive(f"finetune.{name}", getattr(tune, name))
    refuse_unless(
        tune.batch_size % tune.grad_accum_steps == 0,
        f"finetune.batch_size={tune.batch_size} is not divisible by finetune.grad_accum_steps={tune.grad_accum_steps}; set grad_accum_steps to a divisor of it.",
    )
    for name in ("warmup_fraction", "b1", "b2"):
        check_fraction(f"finetune.{name}", getattr(tune, name))
    refuse_unless(tune.weight_decay >= 0, f"finetune.weight_decay={tune.weight_decay} must not be negative.")
    check_choice("finetune.too_long", tune.too_long, ("cut", "cut-both", "drop"))
    refuse_unless(len(tune.seeds) > 0, "finetune.seeds=() is empty; give at least one seed.")
    for path, buckets in (("finetune.length_buckets", tune.length_buckets), ("evaluate.prompt_buckets", config.evaluate.prompt_buckets)):
        refuse_unless(
            len(buckets) > 0 and all(b > 0 for b in buckets) and list(buckets) == sorted(set(buckets)),
            f"{path}={buckets} must be positive and strictly increasing.",
        )
    _check_evaluate(config)
    for name in ("train_rows", "test_rows", "max_length"):
        check_positive(f"probe.{name}", getattr(config.probe, name))
    refuse_unless(
        len(config.probe.l2) > 0 and all(v >= 0 for v in config.probe.l2), f"probe.l2={config.probe.l2} must hold at least one value, none negative."
    )
    refuse_unless(0 < config.spectra.mass <= 1, f"spectra.mass={config.spectra.mass} must lie in (0, 1].")
    refuse_unless(config.spectra.power in (1, 2), f"spectra.power={config.spectra.power} must be 1 (values) or 2 (squares).")
    refuse_unless(
        config.gap.tokens_per_side >= config.train.seq_len,
        f"gap.tokens_per_side={config.gap.tokens_per_side} is below one sequence of train.seq_len={config.train.seq_len} tokens.",
    )
    check_positive("report.bootstrap_samples", config.report.bootstrap_samples)


def _check_task_files(name: str, files: dict[str, str]) -> None:
    from plasticity_jax.data.tasks import tasks

    sets = tasks()[name].sets
    for key in files:
        refuse_unless(bool(sets), f"tasks.{name}.files sets {key!r}, but {name} brings its own rows; leave files out.")
        check_choice(f"tasks.{name}.files", key, sets)
    for key in sets:
        refuse_unless(
            bool(files.get(key)), f"tasks.{name}.files has no {key!r}, and {name} brings no rows of its own; give the file or folder that holds them."
        )


def _check_evaluate(config: StudyConfig) -> None:
    from plasticity_jax.data.tasks import tasks

    evaluate, reward, verifier, zero_shot = config.evaluate, config.reward, config.verifier, config.zero_shot
    for name in ("n_samples", "temperature", "batch_size", "repetition_penalty"):
        check_positive(f"evaluate.{name}", getattr(evaluate, name))
    refuse_unless(evaluate.top_k >= 0, f"evaluate.top_k={evaluate.top_k} must not be negative; 0 samples from all tokens.")
    refuse_unless(0 < evaluate.top_p <= 1, f"evaluate.top_p={evaluate.top_p} must be above 0 and at most 1, which samples from all tokens.")
    refuse_unless(all(evaluate.stop), f"evaluate.stop={evaluate.stop} holds an empty string, at which every completion would end; leave it out.")
    refuse_unless(evaluate.grade_workers >= 0, f"evaluate.grade_workers={evaluate.grade_workers} must not be negative; 0 takes one process per core.")
    check_choice("reward.scorer", reward.scorer, ("none", "log-probability", "verifier", "sequence-classification"))
    for name in ("max_length", "batch_size"):
        check_positive(f"reward.{name}", getattr(reward, name))
    takes_model = reward.scorer in ("log-probability", "sequence-classification")
    refuse_unless(
        reward.model is None or takes_model, f"reward.model={reward.model} has no effect with reward.scorer={reward.scorer!r}; leave it out."
    )
    refuse_unless(
        reward.model is not None or reward.scorer != "sequence-classification",
        "reward.scorer='sequence-classification' needs reward.model, the folder of a Hugging Face reward model.",
    )
    for name in ("n_samples", "epochs", "peak_lr", "batch_size"):
        check_positive(f"verifier.{name}", getattr(verifier, name))
    check_fraction("verifier.warmup_fraction", verifier.warmup_fraction)
    refuse_unless(
        0 < verifier.held_out_fraction < 1,
        f"verifier.held_out_fraction={verifier.held_out_fraction} must lie strictly between 0 and 1; 0.2 is usual.",
    )
    for name, settings in config.tasks.items():
        refuse_unless(
            reward.scorer != "verifier" or settings.verifier_rows > 0 or tasks()[name].grader == "likelihood",
            f"reward.scorer='verifier' needs rows of its own in every task; set tasks.{name}.verifier_rows, such as 200.",
        )
    for i, name in enumerate(zero_shot.sets):
        check_choice(f"zero_shot.sets[{i}]", name, ZERO_SHOT_SETS)
    if zero_shot.limit is not None:
        check_positive("zero_shot.limit", zero_shot.limit)
    check_positive("zero_shot.batch_size", zero_shot.batch_size)
