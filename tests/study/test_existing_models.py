"""A grid of models that exist: the whole study after pretraining, for Hugging Face folders of both families and for runs; and runs asked for by themselves."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from running import plasticity, status_rows
from tiny_models import tiny_model

import plasticity_jax as pj
from plasticity_jax.config import grid_members, load_config
from plasticity_jax.data.loader import TokenRecords
from plasticity_jax.report.results import collect
from plasticity_jax.report.verdicts import ONE_RUN, verdicts
from plasticity_jax.study.graph import build_graph

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("tea", "shed", "north", "rule", "ocean", "die", "hill", "red")
CONFIG = """
from plasticity_jax.config import base_config, task

def get_config():
    config = base_config()
    config.name = "existing"
    config.grid.models = {models!r}
    config.grid.axis = {axis!r}
    config.data.sources = ()
    config.data.files = {text!r}
    config.data.held_out_fraction = 0.5
    config.data.workers = 1
    config.train.seq_len = 32
    config.train.held_out_tokens = 512
    config.train.compute_dtype = "float32"
    config.finetune.batch_size = 8
    config.finetune.length_buckets = (64,)
    config.tasks = {{"color": task(rows={rows!r}, prompt="What color is {{thing}}?", answer="{{color}}", train_rows=16, test_rows=8, validation_rows=4, epochs=1, max_new_tokens=4)}}
    config.evaluate.n_samples = 1
    config.evaluate.max_length = 64
    config.evaluate.prompt_buckets = (60,)
    config.forgetting.held_out_loss = True
    config.report.bootstrap_samples = 50
    return config
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with four tiny models of two families, text, and the table of a task."""
    folder = tmp_path_factory.mktemp("existing")
    for name, family, seed in (("a", "llama", 0), ("b", "olmo2", 1), ("c", "llama", 2), ("other", "llama", 3)):
        tiny_model(folder / name, family, seed=seed)
    draw = np.random.default_rng(0)
    (folder / "text").mkdir()
    documents = [json.dumps({"text": " ".join(draw.choice(WORDS, 60))}) for _ in range(40)]
    (folder / "text" / "own.jsonl").write_text("\n".join(documents) + "\n")
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["thing", "color"])
        writer.writerows([f"thing {i}", ("red", "blue")[i % 2]] for i in range(40))
    return folder


def write_config(place: Path, models, axis="weight_decay", name="config") -> Path:
    path = place / f"{name}.py"
    path.write_text(CONFIG.format(models=models, axis=axis, text=str(place / "text"), rows=str(place / "rows.csv")))
    return path


@pytest.fixture(scope="module")
def study(place) -> Path:
    """A workdir with the finished study of three models, two of which share a label."""
    config = write_config(place, ((0.1, str(place / "a")), ("1", str(place / "b")), (0.1, str(place / "c"))))
    done = plasticity("study", "--config", config, "--workdir", place / "work")
    assert done.returncode == 0, done.stderr
    return place / "work"


def test_every_model_goes_through_all_that_follows_pretraining(study):
    rows = status_rows(study)
    assert {row["state"] for row in rows} == {"done"}
    members = {"wd0.1", "wd1", "wd0.1-s1"}
    for stage in ("import", "held_out", "forgetting", "spectra", "finetune", "evaluate", "validation"):
        assert {row["member"] for row in rows if row["stage"] == stage} == members
    assert not {"pretrain", "init", "gap", "probe"} & {row["stage"] for row in rows}
    prepared = [row["id"] for row in rows if row["stage"] == "prepare"]
    assert len(prepared) == 2  # one corpus for the tokenizer that all three have, and the task: no wheels
    page = (study / "existing" / "report" / "index.html").read_text()
    assert "three language models" in page.lower() and "were taken as they are" in page


def test_held_out_losses_are_those_of_the_folders(place, study):
    results = collect(study / "existing")
    (corpus,) = {s.run.parents["corpus"] for s in results.runs if s.run.stage == "held_out"}
    records = TokenRecords(study / "existing" / corpus / "tokens", "held_out")
    tokens = records.tokens(range(16))  # 512 tokens
    for member in results.members:
        logits, _ = pj.load_model(member.member.model)(tokens[:, :-1])
        logits = np.asarray(logits, np.float64)
        of_targets = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        assert member.loss == pytest.approx(float((np.log(np.exp(logits).sum(-1)) - of_targets).mean()), rel=1e-4)
        rise = member.records("forgetting")["color"].held_out["loss"] - member.loss
        assert rise != 0


def test_claims_say_what_is_not_known_of_models_from_elsewhere(study):
    results = collect(study / "existing")
    found = {verdict.source: verdict for verdict in verdicts(results)}
    assert "in which order" in found["train-validation gap"].evidence
    assert found["pretraining loss over λ"].evidence.startswith("Held-out loss in nats per token: ")
    assert not results.same_start and not results.same_batches
    # One label has two models and the other has one, so only one pair can be compared.
    assert found["attention matrices, section 4.2"].verdict == ONE_RUN and found["attention matrices, section 4.2"].seeds == 1


def test_a_changed_folder_makes_exactly_its_runs_stale(place, study):
    config = load_config(place / "config.py")
    before = {run.id: run.member for run in build_graph(config)}
    kept = (place / "b" / "model.safetensors").read_bytes()
    (place / "b" / "model.safetensors").write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    try:
        after = {run.id for run in build_graph(config)}
    finally:
        (place / "b" / "model.safetensors").write_bytes(kept)
    assert {member for run, member in before.items() if run not in after} == {"wd1"}
    assert all(run in after for run, member in before.items() if member != "wd1")


def test_what_was_asked_for_by_itself_is_shown(place, study):
    config = place / "config.py"
    for words in (("evaluate", "--model", place / "other", "--task", "color"), ("finetune", "--base", place / "a", "--task", "color", "--seed", 7)):
        done = plasticity(*words, "--config", config, "--workdir", study)
        assert done.returncode == 0, done.stderr
    rows = {row["id"].rpartition("-")[0]: row for row in status_rows(study)}
    assert rows["evaluate/other-color-before"]["state"] == rows["finetune/wd0.1-color-s7"]["state"] == rows["import/other"]["state"] == "done"
    shown = plasticity("show", "--workdir", study, "--member", "other", "--json")
    assert len(shown.stdout.splitlines()) == 8 and json.loads(shown.stdout.splitlines()[0])["weight_decay"] is None
    opened = pj.open_study(study)
    assert "other" in {row["model"] for row in opened.table("other_models")} and len(opened.table()) == 3
    assert plasticity("report", "--workdir", study).returncode == 0
    assert "What else was run in this folder" in (study / "existing" / "report" / "index.html").read_text()


def test_a_run_is_a_model_too(place, study):
    tuned = next(Path(row["path"]) for row in status_rows(study) if row["stage"] == "finetune" and row["member"] == "wd1")
    imported = next(Path(row["path"]) for row in status_rows(study) if row["stage"] == "import" and row["member"] == "wd0.1")
    config = write_config(place, (("tuned", str(tuned)), ("folder", str(place / "a")), ("again", str(place / "c"))), "model", "runs")
    runs = {run.member: run for run in build_graph(load_config(config)) if run.stage == "import"}
    assert runs["folder"].hash == imported.name.rpartition("-")[2]  # the folder, and the run that imported it, are one model
    done = plasticity("study", "--config", config, "--workdir", place / "work2", "--stages", "prepare,import,spectra")
    copied = pj.load_model(place / "work2" / "existing" / runs["tuned"].id)
    original = pj.load_model(tuned)
    assert all(np.array_equal(a, b) for a, b in zip(leaves(copied.params), leaves(original.params), strict=True)), done.stderr
    assert copied.tokenizer.fingerprint == original.tokenizer.fingerprint


def leaves(tree):
    for name in sorted(tree):
        yield from leaves(tree[name]) if isinstance(tree[name], dict) else [np.asarray(tree[name])]


def test_labels_are_numbers_where_all_are(place):
    config = load_config(write_config(place, (("1e9", "a"), (2000, "b")), "tokens seen", "labels"))
    assert [member.name for member in grid_members(config)] == ["tokens_seen1e+09", "tokens_seen2000"]
    named = load_config(write_config(place, (("OLMo 2", "a"), (2, "b")), "family", "labels"))
    assert [member.values["models.family"] for member in grid_members(named)] == ["OLMo 2", "2"]


def gpt2(place: Path) -> Path:
    folder = place / "gpt2"
    if not folder.exists():
        shutil.copytree(place / "a", folder)
        settings = json.loads((folder / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        (folder / "config.json").write_text(json.dumps(settings))
    return folder


def without_tokenizer(place: Path) -> Path:
    folder = place / "mute"
    if not folder.exists():
        shutil.copytree(place / "c", folder)
        (folder / "tokenizer.json").unlink()
    return folder


def unfinished(place: Path) -> Path:
    folder = place / "unfinished"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"run": {}, "config": {}}))
    return folder


def older(place: Path) -> Path:
    folder = place / "older"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"run": {"stage": "pretrain", "of": "an older version"}, "config": {}}))
    (folder / "DONE").write_text(json.dumps({"diverged": ""}))
    return folder


@pytest.mark.parametrize(
    "models, message",
    [
        (lambda p: ((1, str(gpt2(p))),), "GPT2LMHeadModel"),
        (lambda p: ((1, str(p / "a"), 0), (1, str(p / "b"), 0)), "one name and one seed, wd1; give them different labels or seeds"),
        (lambda p: ((1, str(p / "nowhere")),), "nowhere is no folder; give a Hugging Face folder or the directory of a finished run"),
        (lambda p: ((1, str(p / "text")),), "is neither a Hugging Face folder, which has config.json and safetensors, nor a run"),
        (lambda p: ((1, str(unfinished(p))),), "is not finished"),
        (lambda p: ((1, str(older(p))),), "of another version"),
        (lambda p: ((1, str(p / "a")), (2, str(p / "a"))), "hold the same model"),
        (lambda p: ((1, str(without_tokenizer(p))),), "holds no tokenizer.json"),
        (lambda p: (("large", str(p / "a")),), "no weight decay"),
        (lambda p: ((1,),), "must be (label, path) or (label, path, seed)"),
    ],
)
def test_what_is_no_grid_of_models_is_refused_in_one_line(place, tmp_path, models, message):
    config = write_config(place, models(place), name="refused")
    ended = plasticity("study", "--config", config, "--workdir", tmp_path / "work")
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("plasticity: ")]
    assert ended.returncode == 2 and message in line and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "override, message",
    [
        ("grid.weight_decay=(0.1,)", "grid.weight_decay=(0.1,) is for models that are pretrained here"),
        ("grid.timescales=(0.1,)", "grid.timescales=(0.1,) is for models"),
        ("grid.seeds=(1,2)", "set it to (0,)"),
        ("grid.fields=(('train.peak_lr',(0.1,0.2)),)", "sweep fields of finetune only"),
        ("data.tokenizer=sentencepiece-32k", "each of grid.models has its own tokenizer"),
    ],
)
def test_what_is_settled_in_the_models_cannot_be_set(place, tmp_path, override, message):
    config = write_config(place, ((1, str(place / "a")),), name="settled")
    ended = plasticity("study", "--config", config, "--workdir", tmp_path / "work", f"--config.{override}")
    assert ended.returncode == 2 and message in ended.stderr and not (tmp_path / "work").exists()


def test_the_example_config_has_a_graph(place):
    models = f"((21e9, {str(place / 'a')!r}), (210e9, {str(place / 'b')!r}))"
    config = load_config(ROOT / "configs" / "from_checkpoints.py", [("grid.models", models), ("train.compute_dtype", "float32")])
    stages = {run.stage for run in build_graph(config)}
    assert {"import", "held_out", "finetune", "forgetting", "evaluate", "spectra", "probe"} <= stages and not {"init", "pretrain", "gap"} & stages
