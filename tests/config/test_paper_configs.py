"""Every config file gives a graph; the paper's hold the paper's numbers, and their commands work."""

import math
import re
import shlex
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh
from running import plasticity

from plasticity_jax.config import StudyConfig, for_device, grid_members, load_config, member_config
from plasticity_jax.config.presets import presets
from plasticity_jax.data.tasks import get_task
from plasticity_jax.model.transformer import abstract_params
from plasticity_jax.parallel.batches import padded_batch_size, part_counts
from plasticity_jax.parallel.deviceless import GPUS, TPUS
from plasticity_jax.parallel.hardware import named
from plasticity_jax.parallel.mesh import axis_sizes
from plasticity_jax.parallel.sharding import param_shardings
from plasticity_jax.study.graph import build_graph

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
PAPER = [name for name in FILES if name.startswith(("llama", "olmo2"))]
SLICE = re.compile(rf"\b({'|'.join((*TPUS, *GPUS))}):(\d+(?:x\d+)*)")
TASKS = {"MetaMathQA", "MedMCQA", "PubMedQA", "MMLUProCoT", "RACE", "SimpleScaling"}


def load(name: str, *, faithful: bool = False) -> StudyConfig:
    return load_config(ROOT / "configs" / f"{name}.py", [("train.compute_dtype", "float32"), *([("faithful", "True")] if faithful else [])])


@pytest.mark.parametrize("name", [name for name in FILES if name != "from_checkpoints"])  # whose models are elsewhere: study/test_existing_models.py
def test_every_config_has_a_graph_from_a_corpus_to_a_score(name):
    runs = build_graph(load(name))
    by_id = {run.id: run for run in runs}
    for member in grid_members(load(name)):
        mine = [run for run in runs if run.stage == "finetune" and run.member == member.name]
        assert mine and all(by_id[run.parents["base"]].member == member.base for run in mine)
    assert {"prepare", "init", "pretrain", "evaluate"} <= {run.stage for run in runs}


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("faithful", [False, True])
def test_paper_configs_fine_tune_and_evaluate_as_the_paper_did(name, faithful):
    """Paper sections 4 and 5: the sets, three epochs, no decay, cosine to zero, 16 samples at temperature 1 with a repetition penalty of 1.1, Skywork."""
    config = load(name, faithful=faithful)
    tasks = {
        "llama_1b_sft_sweep": {"SimpleScaling"},
        "olmo2_1b_sft_sweep": {"MetaMathQA", "SimpleScaling"},
        "llama_1b_commonsense": {"HellaSwag", "WinoGrande", "PIQA", "ARC-Easy", "ARC-Challenge"},
        "llama_1b_safety": {"Safety", "CRUXEval", "BoardgameQA", "TabMWP", "StrategyQA"},
    }
    assert set(config.tasks) == tasks.get(name, TASKS) and len(config.zero_shot.sets) == 7
    assert all((task.epochs, task.train_rows) == (3, 1_000_000) for name, task in config.tasks.items() if get_task(name).trained)
    tuning, evaluation = config.finetune, config.evaluate
    assert (tuning.batch_size, tuning.weight_decay, tuning.group_by_length, tuning.packing) == (64, 0.0, False, False)
    assert tuning.too_long == ("cut-both" if faithful else "cut") and tuning.length_buckets[-1] == 2048
    assert (evaluation.n_samples, evaluation.temperature, evaluation.repetition_penalty, evaluation.top_k) == (16, 1.0, 1.1, 0)
    if name not in ("llama_1b_commonsense", "llama_1b_safety"):
        assert config.reward.scorer == "sequence-classification" and "Skywork-Reward-Llama-3.1-8B" in config.reward.model
    assert config.data.tokenizer == ("dolma2" if name.startswith("olmo2") else "sentencepiece-32k")
    assert load_config(ROOT / "configs" / f"{name}.py").train.compute_dtype == "bfloat16"


# λ, tokens, sequences per batch, steps, peak rate, timescales of the run at some λ: paper sections 3.2, 3.4 and 9.
TABLE = {
    "llama_0p5b_20tpp": (
        (0, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1, 1.5, 3, 10),
        10e9,
        512,
        9536,
        2.5e-4,
        {0.1: 4.19, 0.5: 0.84, 1: 0.42, 3: 0.14, 10: 0.042},
    ),
    "llama_1b_20tpp": ((0, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1, 1.5, 3, 10), 20e9, 512, 19073, 2e-4, {0.1: 2.62, 0.5: 0.52, 1: 0.26, 3: 0.087, 10: 0.026}),
    "llama_4b_20tpp": ((0, 0.1, 1), 80e9, 1024, 38146, 1.5e-4, {0.1: 1.75, 1: 0.17}),
    "olmo2_1b_20tpp": ((0, 0.1, 0.3, 0.6, 1), 30e9, 512, 14305, 4e-4, {0.1: 1.75, 0.3: 0.58, 0.6: 0.29, 1: 0.17}),
    "olmo2_1b_140tpp": ((0, 0.1, 0.3, 1), 210e9, 512, 100135, 4e-4, {0.1: 0.25, 0.3: 0.083, 1: 0.025}),
}


@pytest.mark.parametrize("name", TABLE)
def test_paper_configs_hold_the_papers_numbers(name):
    decays, tokens, batch, steps, peak_lr, timescales = TABLE[name]
    config = load(name)
    train = config.train
    assert (train.batch_size, train.steps, train.peak_lr) == (batch, steps, peak_lr)
    assert tokens - batch * train.seq_len < steps * batch * train.seq_len <= tokens
    assert tuple(m.weight_decay for m in grid_members(config)) == decays
    for decay, share in timescales.items():
        (found,) = (m.timescale for m in grid_members(config) if m.weight_decay == decay)
        assert found == pytest.approx(share, rel=0.035)  # the paper's table has two digits
    olmo2 = name.startswith("olmo2")
    assert (train.b1, train.b2, train.eps, train.clip_norm, train.z_loss) == (0.9, 0.95, 1e-8, 1.0, 1e-5 if olmo2 else 0.0)
    assert (config.decay.kind, config.decay.mask, train.seq_len) == ("coupled", "olmo" if olmo2 else "all", 4096 if olmo2 else 2048)
    assert (train.schedule, train.final_lr_fraction) == (("wsd", 0.0) if name == "olmo2_1b_140tpp" else ("cosine", 0.1))
    assert config.model in presets().values() and not config.data.isolate_documents and not config.faithful
    assert (config.finetune.peak_lr, config.finetune.batch_size, config.finetune.weight_decay) == (7.5e-6 if "4b" in name else 1e-5, 64, 0.0)


def test_the_learning_rate_grid_is_a_product():
    members = grid_members(load("olmo2_1b_lr_grid"))
    found = {(m.weight_decay, dict(m.overrides)["train.peak_lr"]) for m in members}
    assert found == {(decay, rate) for decay in (0.1, 0.6, 1.0) for rate in (2e-4, 4e-4, 8e-4)} and len(members) == 9


def test_faithful_batches_are_those_that_were_run():
    nominal, faithful = load("llama_1b_20tpp"), load("llama_1b_20tpp", faithful=True)
    assert (nominal.train.batch_size, nominal.train.steps, faithful.train.batch_size, faithful.train.steps) == (512, 19073, 1024, 9536)
    config = load("llama_4b_20tpp", faithful=True)
    found = {m.weight_decay: (own.train.batch_size, own.train.steps) for m in grid_members(config) if (own := member_config(config, m))}
    assert found == {0.0: (4096, 9536), 0.1: (1024, 38146), 1.0: (8192, 4768)}


@pytest.mark.parametrize("name", PAPER)
def test_the_command_in_the_docstring_prints_the_plan_that_the_docstring_states(name, tmp_path, monkeypatch):
    """The command is run as it stands there, with a workdir that is here, and as a plan."""
    monkeypatch.chdir(ROOT)
    document = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    program, *words = shlex.split(re.search(r"Command: (.*)", document)[1])
    words = [word for word in words if "gs://BUCKET" not in word]  # whose driver is an extra
    words[words.index("--workdir") + 1] = str(tmp_path)
    planned = plasticity(*words, "--dry-run", "-v")
    assert program == "plasticity" and planned.returncode == 0, planned.stderr
    if "Timescales:" not in document:  # those of another config, which states them
        return
    stated = re.search(r"Timescales:(.*)", document)[1]
    planned_scales = re.findall(r"λ = ([\d.e-]+),.*timescale ([\d.,]+) of the run", planned.stdout)
    assert len(planned_scales) == sum(member.timescale is not None for member in grid_members(load(name)))
    for decay, share in planned_scales:
        said = map(float, re.findall(rf" {float(decay):g} (\d+(?:\.\d+)?)", stated))
        assert any(one == pytest.approx(float(share.replace(",", "")), rel=0.0051) for one in said), (decay, share)
    config = load(name)
    assert f"{config.train.steps:,} steps of {config.train.batch_size} x {config.train.seq_len}" in document


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("faithful", [False, True])
def test_every_member_can_be_laid_out_on_the_slices_that_the_docstring_names(name, faithful):
    """Without devices: the mesh resolves, it divides every parameter, and no batch needs padding but those smaller than the slice."""
    (line,) = re.findall(r"Devices:.*", (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8"))
    config, slices = load(name, faithful=faithful), SLICE.findall(line)
    assert len(slices) >= 2
    for kind, shape in slices:
        known = named(kind)
        assert known is not None
        for own in (for_device(member_config(config, member), known.kind) for member in grid_members(config)):
            sizes = axis_sizes(own.mesh, math.prod(map(int, shape.split("x"))))
            mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
            param_shardings(mesh, abstract_params(own.model))
            assert padded_batch_size(mesh, own.train.batch_size, own.train.grad_accum_steps, "train") == own.train.batch_size
            tuned = padded_batch_size(mesh, own.finetune.batch_size, own.finetune.grad_accum_steps, "finetune")
            assert tuned == max(own.finetune.batch_size, sizes["data"] * sizes["fsdp"])
            assert own.train.grad_accum_steps in part_counts(mesh, own.train.batch_size)


def test_the_sweeps_of_the_fine_tuning_are_the_authors():
    """81 runs of Llama and 135 of OLMo-2 per task, with λ 0.6 without the rate of 6e-4: the authors' configs, as recorded in the study's facts."""
    llama, olmo = (grid_members(load(f"{family}_1b_sft_sweep")) for family in ("llama", "olmo2"))
    assert (len(llama), len(olmo)) == (81, 135)
    rates = {member.weight_decay: set() for member in olmo}
    for member in olmo:
        rates[member.weight_decay].add(dict(member.overrides)["finetune.peak_lr"])
    assert rates == {0.1: {1e-5, 3e-5, 6e-5, 6e-4}, 0.3: {1e-5, 3e-5, 6e-5, 6e-4}, 0.6: {1e-5, 3e-5, 6e-5}, 1.0: {1e-5, 3e-5, 6e-5, 6e-4}}
    assert {dict(member.overrides)["finetune.peak_lr"] for member in llama} == {1e-5, 3e-5, 6e-4}
