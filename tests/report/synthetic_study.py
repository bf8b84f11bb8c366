"""A study directory with planted results, in the stages' formats. Nothing in it was measured."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from plasticity_jax.config import (
    FinetuneConfig,
    ForgettingConfig,
    GridConfig,
    ProbeConfig,
    ReportConfig,
    RewardConfig,
    StudyConfig,
    TaskConfig,
    TrainConfig,
    ZeroShotConfig,
    grid_members,
)
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.jsonfiles import write_jsonl
from plasticity_jax.runs.run import Run
from plasticity_jax.study.graph import build_graph, run_configs, save_study

VALIDATION = 100  # validation rows of a task, where it has any
PROBLEMS = {"topic": 300, "sentiment": 200}
MAJORITY = {"topic": 0.2, "sentiment": 0.51}
DOMAINS = ("news", "wikipedia")
DECAY_TABLE = {"embed/embedding": True, "blocks/attention/q/kernel": True, "final_norm/scale": True}


@dataclass(frozen=True)
class Planted:
    """What each member of the grid is to show, in the order of the timescales and over again. None leaves a stage out there; in `loss` it means diverged."""

    loss: tuple = (3.30, 3.20, 3.10, 3.15)
    before: tuple = (0.10, 0.10, 0.10, 0.10)
    after: tuple = (0.60, 0.65, 0.75, 0.80)
    validation: tuple = ()  # empty: the tasks have no validation rows
    rank_qk: tuple = (0.80, 0.70, 0.50, 0.30)
    rank_vo: tuple = (0.85, 0.84, 0.83, 0.80)
    norm_qk: tuple = (4.0, 3.0, 2.0, 1.0)  # Frobenius norm of W_QK, whose noise floor is 0.1
    gap: tuple = (0.50, 0.40, 0.20, 0.05)
    probe: tuple = (0.60, 0.64, 0.70, 0.74)
    control_passes: bool = True
    seeds: tuple = (0,)
    grid: GridConfig | None = None  # instead of one timescale per loss
    scorer: str = "none"
    zero_shot: tuple = ()
    finetune: FinetuneConfig = FinetuneConfig()
    forgetting: float | tuple | None = None  # rise of the held-out loss after fine-tuning
    reward: tuple = ()  # what every reward is shifted by; RM rises by a tenth of it
    name: str = "planted"
    train: dict = field(default_factory=dict)  # fields of `train` that differ from the defaults
    tasks: tuple = tuple(PROBLEMS)
    unended: float = 0.0  # share of the completions that the limit on tokens ended
    data: str = ""  # end of the fingerprints of the prepared data


def config_of(planted: Planted) -> StudyConfig:
    timescales = (None, 4.0, 0.8, 0.2, 0.05)[: len(planted.loss)]
    return StudyConfig(
        name=planted.name,
        train=TrainConfig(**planted.train),
        grid=planted.grid or GridConfig(timescales=timescales, seeds=planted.seeds),
        tasks={name: TaskConfig(test_rows=PROBLEMS[name], validation_rows=VALIDATION if planted.validation else 0) for name in planted.tasks},
        finetune=planted.finetune,
        reward=RewardConfig(scorer=planted.scorer),
        zero_shot=ZeroShotConfig(sets=planted.zero_shot),
        forgetting=ForgettingConfig(held_out_loss=planted.forgetting is not None),
        probe=ProbeConfig(sets=("topic",)),
        report=ReportConfig(bootstrap_samples=500),
    )


def write_study(workdir: Path, planted: Planted = Planted(), *, stages: tuple[str, ...] | None = None) -> Path:
    """Writes the study and returns its folder. `stages` limits it to what has run so far."""
    config = config_of(planted)
    runs = build_graph(config)
    save_study(workdir, replace(config, train=replace(config.train, compute_dtype="float32")), runs)
    index = {name: i % len(planted.loss) for i, member in reversed(list(enumerate(grid_members(config)))) for name in (member.base, member.name)}
    configs = run_configs(config, runs)
    for run in runs:
        if stages is not None and run.stage not in stages:
            continue
        point = index.get(run.member)
        if run.stage not in ("prepare", "init", "pretrain") and (planted.loss[point] is None or _left_out(planted, run, point)):
            continue
        _WRITERS[run.stage](workdir / config.name / run.id, run, planted, point, configs[run.id])
    return workdir / config.name


def _left_out(planted: Planted, run: Run, point: int) -> bool:
    values = {
        "probe": planted.probe,
        "spectra": planted.rank_qk,
        "gap": planted.gap,
        "validation": planted.validation,
        "finetune": planted.after,
        "reward": planted.after,
        "zero_shot": planted.after,
        "forgetting": planted.after,
    }
    values = (
        planted.after
        if run.stage == "evaluate" and run.fields["when"] == "after"
        else planted.before
        if run.stage == "evaluate"
        else values[run.stage]
    )
    return values[point] is None


def _finish(path: Path, run: Run, results: dict, provenance: dict | None = None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    directory = RunDirectory(path)
    directory.provenance = {"parents": run.parents, "versions": {"jax": "0.0.0-planted"}, "git": {"commit": "c0ffee", "dirty": False}} | (
        provenance or {}
    )
    directory.finish(results)


def _prepare(path, run, planted, point, config):
    summary = {"fingerprint": f"fingerprint-of-{run.name}{planted.data}"}
    if run.task:
        splits = {"train": {"train": 100}, "test": {"validation": 50} if run.task == "sentiment" else {"held_out": 50}}
        summary |= {"rows": {"train": 6000, "test": PROBLEMS[run.task]}, "source_splits": splits, "licences": {"a-package": "a licence"}}
    _finish(path, run, summary)


def _pretrain(path, run, planted, point, config):
    path.mkdir(parents=True, exist_ok=True)
    loss, steps, decay = planted.loss[point], config.train.steps, run.fields["weight_decay"]
    end = 4.0 if loss is None else loss
    last = steps // 2 if loss is None else steps
    rows = [
        {"step": s, "tokens": s * 4096, "loss": end + 4.0 * np.exp(-s / 60) - 0.05, "lr": 1e-3, "grad_norm": 1.0} for s in range(10, last + 1, 10)
    ]
    rows += [{"step": s, "held_out": {"loss": end + 4.0 * np.exp(-s / 60), "domains": {}}} for s in range(100, last + 1, 100)]
    if loss is None:
        rows.append({"step": last + 10, "tokens": 0, "loss": float("nan"), "lr": 1e-3, "grad_norm": float("inf")})
    write_jsonl(path / "metrics.jsonl", rows)
    domains = {d: {"loss": end + shift, "bits_per_byte": (end + shift) / 2, "tokens": 1000} for d, shift in zip(DOMAINS, (-0.2, 0.2))}
    results = {
        "diverged": f"loss nan at step {last + 10}" if loss is None else None,
        "steps": last,
        "tokens": last * 4096,
        "seconds": 70.0,
        "tokens_per_second": 27_000.0,
        "parameters": 530_000 * config.model.d_model // 96,
        "weight_decay": decay,
        "peak_lr": config.train.peak_lr,
        "lr_times_decay": config.train.peak_lr * decay,
        "timescale_steps": 1 / (config.train.peak_lr * decay) if decay else None,
        "timescale_share": 1 / (config.train.peak_lr * decay * steps) if decay else None,
        "decay_table": DECAY_TABLE,
        "compute_dtype": "float32",
        "train_loss": float("nan") if loss is None else loss - 0.05,
        "held_out": None if loss is None else {"loss": loss, "bits_per_byte": loss / 2, "domains": domains},
        "norms": {},
    }
    _finish(path, run, results, {"device_kind": "cpu", "step_0_sha256": "step-0-hash", "mesh": {"data": 1}})


def _validation(path, run, planted, point, config):
    right = round(VALIDATION * planted.validation[point])
    results = {
        "metrics": {"pass@1": right / VALIDATION},
        "problems": VALIDATION,
        "n_samples": 0,
        "failures": {"greedy": {"wrong": 1 - right / VALIDATION, "no answer": 0.0, "timed out": 0.0}},
        "majority_class": MAJORITY[run.task],
        "per_problem": {"greedy": [int(i < right) for i in range(VALIDATION)]},
        "source_splits": ["train"],
        "seconds": 1.0,
    }
    _finish(path, run, results)


def _evaluate(path, run, planted, point, config):
    when, task = run.fields["when"], run.task
    share = (planted.after if when == "after" else planted.before)[point]
    count = PROBLEMS[task]
    # Every model finds the same problems hard, as models of one family do.
    difficulty = (np.arange(count) * 0.6180339887) % 1
    greedy = (difficulty < share).astype(int)
    samples = np.round(8 * np.clip(share + 0.2 * (0.5 - difficulty), 0, 1)).astype(int)
    metrics = {
        "pass@1": greedy.mean(),
        "maj@8": greedy.mean(),
        "pass@8": (samples > 0).mean(),
        "correct_ratio@8": samples[samples > 0].mean() / 8 if samples.any() else 0.0,
        "mean@8": samples.mean() / 8,
    }
    problems, rows = [], []
    for i in range(count):
        text = f"Which <b>word</b> & why? number {i} " + "text " * 70
        problems.append(
            {"id": f"{task}-{i}", "prompt": f"Human: {text}\nAssistant:", "problem": text, "gold": "planted", "subset": "", "source_split": "none"}
        )
        for sample in range(9):
            right = greedy[i] if sample == 0 else sample <= samples[i]
            row = {"id": f"{task}-{i}", "sample": sample, "ended": True, "majority": sample == 1, "correct": bool(right)}
            shown = (
                {"text": "The answer is planted.", "answer": "planted", "verdict": "right"}
                if right
                else {"text": "<script>alert(1)</script>", "answer": None, "verdict": "no answer"}
            )
            rows.append(row | shown)
    path.mkdir(parents=True, exist_ok=True)
    write_jsonl(path / "problems.jsonl", problems)
    write_jsonl(path / "completions.jsonl", rows)
    _finish(
        path,
        run,
        {
            "metrics": metrics,
            "problems": count,
            "n_samples": 8,
            "failures": {kind: {"wrong": 0.0, "no answer": 1 - share, "timed out": 0.0} for kind in ("greedy", "samples")},
            "majority_class": MAJORITY[task],
            "subsets": {"easy": {"pass@1": share, "problems": 150}, "hard": {"pass@1": share / 2, "problems": 50}} if task == "sentiment" else {},
            "per_problem": {"greedy": greedy, "samples": samples, "majority": greedy},
            "cut_prompts": 0,
            "unended": planted.unended,
            "seconds": 1.0,
            "diverged": None,
            "source_splits": ["none"],
        },
    )


def _probe(path, run, planted, point, config):
    layers = ["embed", *(f"block{i + 1}" for i in range(config.model.n_layers))]
    difficulty = (np.arange(800) * 0.6180339887) % 1
    accuracies = [0.4, *(planted.probe[point] + 0.02 * i for i in range(config.model.n_layers))]
    found = {
        "layers": layers,
        "accuracy": accuracies,
        "accuracy_norm_free": accuracies,
        "accuracy_shuffled": [0.25] * len(layers),
        "bag_of_words": 0.5,
        "l2": [0.01] * len(layers),
        "majority": 0.25,
        "n_train": 2000,
        "n_test": 800,
        "classes": 5,
        "dropped_leaks": 0,
        "correct": [(difficulty < a).astype(int) for a in accuracies],
    }
    _finish(path, run, {"sets": {"topic": found}, "seconds": 1.0, "diverged": None})


def _spectra(path, run, planted, point, config):
    wobble = 0.02 * np.sin(np.arange(config.model.n_layers * config.model.n_heads) * (1 + point)).reshape(config.model.n_layers, config.model.n_heads)
    norms = {"W_QK": planted.norm_qk[point % len(planted.norm_qk)], "W_VO": 2.0}
    results = {
        name: {"pseudo_rank": rank[point] + wobble, "frobenius_norm": norms[name] + 0 * wobble, "noise_floor": 0.1 + 0 * wobble}
        for name, rank in (("W_QK", planted.rank_qk), ("W_VO", planted.rank_vo))
    }
    _finish(path, run, results | {"mass": 0.95, "power": 1, "fold_norms": False, "norm_gains": {}, "seconds": 1.0})


def _gap(path, run, planted, point, config):
    size, rng = planted.gap[point], np.random.default_rng(0)
    blocks = {}
    for side, shift in (("seen", 0.0), ("held_out", size)):
        hard = rng.normal(scale=0.3, size=80)
        hard -= hard.mean()
        noise = 0.02 * np.sin(np.arange(80) * (2 + point))
        blocks[side] = [
            {"domain": DOMAINS[i % 2], "document": i // 4, "record": i, "loss": 3.0 + shift + hard[i] + noise[i], "unigram_loss": 6.0}
            for i in range(80)
        ]
    control = {
        "seen": 6.0,
        "held_out": 6.0,
        "gap": 0.0 if planted.control_passes else 0.3,
        "interval": [-0.05, 0.05] if planted.control_passes else [0.2, 0.4],
        "passes": planted.control_passes,
    }
    _finish(
        path,
        run,
        {
            "seen": 3.0,
            "held_out": 3.0 + size,
            "gap": size,
            "interval": [size - 0.06, size + 0.06],
            "domains": {},
            "seen_early": 3.0,
            "seen_late": None,
            "control": control,
            "blocks": blocks,
            "adjusted": {"gap": size, "interval": [size - 0.06, size + 0.06]},
            "tokens_per_side": 80 * 128,
            "left_out_domains": [],
            "seconds": 1.0,
        },
    )


def _reward(path, run, planted, point, config):
    count = PROBLEMS[run.task]
    shift = planted.reward[point] if planted.reward else 0.0
    rewards = np.linspace(-1.0, 1.0, count) + shift
    path.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        path / "rewards.jsonl", [{"id": f"{run.task}-{i}", "sample": s, "reward": float(rewards[i])} for i in range(count) for s in range(1, 9)]
    )
    chosen = (np.arange(count) % 2).astype(int)
    chosen[: round(0.1 * count * shift)] = 1
    _finish(
        path,
        run,
        {
            "scorer": "a planted scorer",
            "metrics": {"rm@8": chosen.mean(), "orm_score": rewards.mean()},
            "per_problem": {"rm": chosen, "orm": rewards},
            "cut": 0,
            "seconds": 1.0,
        },
    )


def _zero_shot(path, run, planted, point, config):
    accuracy = 0.25 if run.fields["when"] == "after" else 0.5
    found = {name: {"acc": accuracy, "acc_norm": None, "stderr": 0.01, "n": 100, "correct": [1]} for name in config.zero_shot.sets}
    _finish(path, run, {"sets": found, "versions": {"lm_eval": "0"}, "seconds": 1.0})


def _forgetting(path, run, planted, point, config):
    loss = planted.loss[point] + (planted.forgetting[point] if isinstance(planted.forgetting, tuple) else planted.forgetting)
    domains = {d: {"loss": loss + shift, "bits_per_byte": loss / 2, "tokens": 1000} for d, shift in zip(DOMAINS, (-0.2, 0.2))}
    held_out = {"loss": loss, "bits_per_byte": loss / 2, "domains": domains}
    _finish(path, run, {"held_out": held_out, "seconds": 1.0})


_WRITERS = {
    "forgetting": _forgetting,
    "reward": _reward,
    "zero_shot": _zero_shot,
    "prepare": _prepare,
    "init": lambda path, run, planted, point, config: _finish(path, run, {"parameters": 530_000, "params_sha256": "step-0-hash"}),
    "pretrain": _pretrain,
    "evaluate": _evaluate,
    "validation": _validation,
    "finetune": lambda path, run, planted, point, config: _finish(path, run, {"diverged": None}),
    "probe": _probe,
    "spectra": _spectra,
    "gap": _gap,
}
