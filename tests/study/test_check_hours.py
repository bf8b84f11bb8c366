"""The hours that `plasticity check` estimates for every stage: against closed forms, against what XLA counts, and against the rows that are prepared."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from running import TINY, plasticity

from plasticity_jax.config import ModelConfig, load_config
from plasticity_jax.model.flops import flops_per_token, forward_flops
from plasticity_jax.model.transformer import abstract_params
from plasticity_jax.parallel.deviceless import target
from plasticity_jax.stages import stages
from plasticity_jax.study.hours import lines, study_hours, to_record

SET = [("finetune.seeds", "(0, 1)"), ("reward.scorer", "verifier"), ("reward.max_length", "128"), ("train.compute_dtype", "float32")]
CONFIG = load_config(TINY, [*SET, *[(f"tasks.{task}.verifier_rows", "20") for task in ("addition2", "topic")]])
PEAK, BANDWIDTH = 1e9, 1e30  # of a device whose memory never waits


def machine(bandwidth: float = BANDWIDTH):
    place = target("cpu:1")
    return dataclasses.replace(place, hardware=dataclasses.replace(place.hardware, peak_flops=PEAK, bandwidth=bandwidth))


def seconds_at_peak(config, **settings) -> dict[str, float]:
    """Stage → FLOPs, of a machine that computes at PEAK."""
    mfu = config.launch.mfu
    found = study_hours(config, machine(**settings))
    return {hours.stage: hours.device_hours * 3600 * mfu * PEAK for hours in found if hours.device_hours is not None}


def products(model: ModelConfig) -> tuple[int, int]:
    """Entries of the matrices of all layers, and of the output matrix, from the parameters themselves."""
    params = abstract_params(model)
    kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params["blocks"]) if path[-1].key == "kernel"]
    return sum(math.prod(kernel.shape) for kernel in kernels), model.vocab_size * model.d_model


def test_every_stage_computes_what_its_closed_form_says():
    model = CONFIG.model
    layers, output = products(model)
    attention = 4 * model.n_layers * model.n_heads * model.head_dim  # FLOPs per pair of positions

    def forward(rows, length, outputs):
        return rows * (2 * length * layers + 2 * outputs * output + attention * length**2)

    n_members, n_tasks, n_seeds, n_samples, per_prompt = 2, 2, 2, 2, 3
    train = CONFIG.train
    expected = {
        "pretrain": n_members * train.steps * 3 * forward(8, 64, 64),
        "finetune": n_members * n_tasks * n_seeds * (128 // 16) * 3 * forward(16, 192, 192),  # one epoch, whole batches of the longest bucket
        "gap": n_members * 2 * forward(2048 // 64, 64, 64),
        "probe": n_members * 2 * forward(300, 64, 0),
        "reward": n_members * n_tasks * n_seeds * forward(16 * per_prompt, 128, 0),
        # Of 4 samples and the greedy one, on 20 rows, by both members; three passes over four fifths, and one over the rest.
        "verifier": n_tasks * (3 * 3 * 0.8 + 0.2) * forward(20 * 5 * n_members, 128, 0),
    }

    def decoding(problems, completions, slots):
        prompts = 64 // completions  # at once
        batches = -(-problems // prompts)
        steps = (slots - 1) * batches
        read = forward(prompts * batches, 192, 1)
        return read + steps * prompts * completions * (2 * (layers + output) + attention * (192 + slots))

    before_and_after = n_members + n_members * n_seeds
    expected["evaluate"] = before_and_after * sum(decoding(16, per_prompt, slots) for slots in (24, 8))
    expected["validation"] = n_members * n_seeds * decoding(8, 1, 24)  # of addition2 only
    expected["samples"] = n_members * sum(decoding(20, 5, slots) for slots in (24, 8))
    found = seconds_at_peak(CONFIG)
    for stage, flops in expected.items():
        assert found[stage] == pytest.approx(flops), stage
    assert found.keys() == expected.keys() | {"spectra"} and found["spectra"] > 0
    assert n_samples + 1 == per_prompt


def test_decoding_waits_for_the_memory_where_that_takes_longer():
    """At one byte per second nothing but the reading of weights and caches counts."""
    model, slots = CONFIG.model, 24
    (only,) = [hours for hours in study_hours(one_task(), machine(bandwidth=1.0)) if hours.stage == "evaluate"]
    weights = 4 * sum(products(model))
    cached = 4 * 2 * model.n_layers * model.n_kv_heads * model.head_dim  # bytes of a token
    rows = 21 * 3  # of 64 at once
    steps = slots - 1
    expected = 4 * steps * (weights + cached * (21 * 192 + rows * slots))  # two base models, and two fine-tuned ones
    assert only.device_hours * 3600 == pytest.approx(expected, rel=1e-3)


def one_task():
    config = load_config(TINY, [("train.compute_dtype", "float32")])
    return dataclasses.replace(config, tasks={"addition2": config.tasks["addition2"]})


# Wide enough that what is not a product (norms, softmax, the optimizer) is small.
WIDE = ModelConfig(vocab_size=1024, d_model=256, n_layers=1, n_heads=4, n_kv_heads=2, d_ff=1024)


def test_xla_counts_the_same_for_a_fine_tuning_step_and_a_batch_of_the_gap(monkeypatch):
    from plasticity_jax.model import cpu
    from plasticity_jax.model.forward import Forward, lower_record_nats
    from plasticity_jax.model.load import abstract_loaded
    from plasticity_jax.parallel.mesh import make_mesh
    from plasticity_jax.train.finetune import step_settings
    from plasticity_jax.train.step import abstract_arguments, make_train_step, next_token_batch

    monkeypatch.setattr(cpu, "one_cpu", lambda mesh: False)  # where the loss is a loop, whose body XLA counts once
    mesh = make_mesh(CONFIG.mesh)
    rows, length = 16, 192
    settings = step_settings(CONFIG, WIDE, mesh)
    counted = (
        jax.jit(make_train_step(settings)).lower(*abstract_arguments(settings, next_token_batch(rows, length))).compile().cost_analysis()["flops"]
    )
    assert counted == pytest.approx(rows * length * flops_per_token(WIDE, length), rel=0.1)
    forward = Forward("float32", "xla", False, mesh)
    lowered = lower_record_nats(forward, WIDE, abstract_loaded(WIDE, mesh, "float32"), batch_size=32, seq_len=64, isolate=False, loss_chunks=0)
    assert lowered.compile().cost_analysis()["flops"] == pytest.approx(forward_flops(WIDE, 32, 64), rel=0.1)


def test_prepared_rows_are_counted_as_they_will_be_batched(tmp_path):
    from plasticity_jax.data.tasks import format_prompt, read_task
    from plasticity_jax.data.tokenizer import Tokenizer
    from plasticity_jax.study.graph import build_graph, study_dir

    changed = [("finetune.length_buckets", "(32, 48, 64, 192)"), ("evaluate.prompt_buckets", "(32, 64, 192)"), ("train.compute_dtype", "float32")]
    changed += [("data.max_documents", "60"), ("probe.train_rows", "20"), ("probe.test_rows", "20")]
    assert plasticity("prepare", "--config", TINY, "--workdir", tmp_path, *[f"--config.{key}={value}" for key, value in changed]).returncode == 0
    config = load_config(TINY, changed)
    found = {hours.stage: hours for hours in study_hours(config, machine(), tmp_path)}
    folders = {run.name: study_dir(tmp_path, config) / run.id for run in build_graph(config) if run.stage == "prepare"}
    tokenizer = Tokenizer.load(folders["corpus"])
    expected = 0
    for task in config.tasks:
        needed = []  # a row of n tokens, with its end of text, has n - 1 inputs
        for row in read_task(folders[f"task-{task}"]).train:
            needed.append(sum(len(tokenizer.encode(text)) for text in (format_prompt(row.prompt), row.response)))
        places = np.searchsorted((32, 48, 64, 192), needed)
        for place, length in enumerate((32, 48, 64, 192)):
            batches = -(-int((places == place).sum()) // 16)
            expected += 2 * 16 * batches * length * flops_per_token(config.model, length)
    finetune = found["finetune"]
    assert finetune.device_hours * 3600 * config.launch.mfu * PEAK == pytest.approx(expected)
    (bound,) = [hours for hours in study_hours(config, machine()) if hours.stage == "finetune"]
    assert not finetune.assumes and bound.assumes and finetune.device_hours < bound.device_hours
    assert list(found["evaluate"].assumes) == ["addition2: completions of 24 tokens", "topic: completions of 8 tokens"]


def test_a_base_model_that_recipes_share_counts_once():
    swept = load_config(TINY, [("grid.fields", "(('finetune.peak_lr', (1e-3, 2e-3, 3e-3)),)"), ("train.compute_dtype", "float32")])
    plain = load_config(TINY, [("train.compute_dtype", "float32")])
    found, once = seconds_at_peak(swept), seconds_at_peak(plain)
    assert (found["pretrain"], found["finetune"]) == pytest.approx((once["pretrain"], 3 * once["finetune"]))


def test_what_is_not_estimated_is_said(monkeypatch):
    silent = {name: dataclasses.replace(stage, work=None) if name == "gap" else stage for name, stage in stages().items()}
    monkeypatch.setattr("plasticity_jax.study.hours.stages", lambda: silent)
    config = dataclasses.replace(CONFIG, reward=dataclasses.replace(CONFIG.reward, scorer="sequence-classification", model="nowhere"))
    place = machine()
    found = study_hours(config, place)
    text = lines(found, place, 0.4)
    assert "  not estimated: init, prepare, gap: no declared work" in text
    assert any(line.startswith("  not estimated: reward: reward.model=nowhere is not here") for line in text)
    record = to_record(found)
    assert record["device_hours"] == pytest.approx(sum(row["device_hours"] or 0 for row in record["stages"])) and record["at_most"]
    assert [row["stage"] for row in record["stages"] if row["device_hours"] is None] == ["init", "prepare", "gap", "reward"]
