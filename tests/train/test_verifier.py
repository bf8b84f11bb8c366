"""The outcome verifier on made-up completions whose right ones can be told by a word, or not at all."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from test_pretrain import Killed, killed_after, state_of, untimed
from worlds import CONFIG, World, change

from plasticity_jax.errors import UserError
from plasticity_jax.model.checkpoint import drop_optimizer
from plasticity_jax.model.load import load_model
from plasticity_jax.model.scalar_head import abstract_scalar_params, encode_answers, load_verifier, scores, with_head, without_output
from plasticity_jax.model.transformer import hidden_states
from plasticity_jax.parallel.mesh import make_mesh
from plasticity_jax.runs.directory import DONE, RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import verifier as stage
from plasticity_jax.train import verifier
from plasticity_jax.train.step import hyper_parameters, initial_state, make_train_step

pytestmark = pytest.mark.slow

RECIPE = change(change(CONFIG, "verifier", epochs=4, peak_lr=1e-2, batch_size=16, held_out_fraction=0.25), "reward", max_length=40)


def write_samples(folder, right, *, n_problems=60, offset=0):
    """Two samples per problem, besides the greedy one; `right(generator)` gives a text and its verdict."""
    generator = np.random.default_rng(offset)
    with RunDirectory(folder).work(Run("tiny", "samples", folder.name, {}, task="topic"), CONFIG) as directory:
        problems, completions = [], []
        for i in range(n_problems):
            problems.append(
                {"id": f"p{i}", "prompt": f"Human: the {i}\nAssistant:", "problem": f"the {i}", "gold": "x", "subset": "", "source_split": "train"}
            )
            for sample in range(3):
                text, correct = right(generator)
                completions.append({"id": f"p{i}", "sample": sample, "text": text, "answer": "x", "verdict": "", "correct": correct, "ended": True})
        for name, rows in (("problems", problems), ("completions", completions)):
            (directory.path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        directory.finish({})
    return folder


def words(generator):
    return " ".join(generator.choice("cat dog bird house tree river old young".split(), 4))


def separable(generator):
    correct = bool(generator.random() < 0.4)
    return f" {words(generator)} {'red' if correct else 'sees'} {words(generator)[:5]}", correct


def shuffled(generator):
    return separable(generator)[0], bool(generator.random() < 0.4)


def verify(world: World, name: str, samples, config=RECIPE, base="base") -> dict:
    run = Run("tiny", "verifier", name, {}, task="topic", seed=0)
    parents = {"base": world.root / base, "task": world.task} | {f"samples-{i}": path for i, path in enumerate(samples)}
    return world.stage(stage.run, run, world.root / name, config, parents)


@pytest.fixture(scope="module")
def samples(world: World):
    return [write_samples(world.root / f"told-{i}", separable, offset=i) for i in range(2)]


@pytest.fixture(scope="module")
def trained(world: World, samples):
    return verify(world, "told", samples)


def scored_again(run, samples, held_out):
    """Scores and verdicts of the different held-out texts, by the saved model in one batch of another shape than any bucket."""
    model, tokenizer = load_verifier(run)
    right, rows = {}, []
    for path in samples:
        prompts = {row["id"]: row["prompt"] for row in map(json.loads, (path / "problems.jsonl").read_text().splitlines())}
        for row in map(json.loads, (path / "completions.jsonl").read_text().splitlines()):
            if row["id"] in held_out and (row["id"], row["text"]) not in right:
                right[row["id"], row["text"]] = row["correct"]
                rows.append([*tokenizer.encode(prompts[row["id"]]), *tokenizer.encode(row["text"]), tokenizer.eos_id][-40:])
    tokens, lengths = np.array([row + [5] * (47 - len(row)) for row in rows]), np.array([len(row) for row in rows])

    def of(params):
        return scores(params, hidden_states(model.config, params["decoder"], tokens)[0], lengths)

    found = jax.jit(of)(model.params)
    return np.asarray(found), np.array(list(right.values()))


def test_it_learns_what_can_be_told_and_reports_its_held_out_auc(world: World, samples, trained):
    assert trained["diverged"] is None and trained["reason"] == "" and trained["auc"] > 0.95 and trained["accuracy"] > 0.85
    held_out = verifier.held_out_problems([f"p{i}" for i in range(60)], 0.25)
    found, right = scored_again(world.root / "told", samples, held_out)
    assert trained["auc"] == pytest.approx(roc_auc_score(right, found), abs=2e-3)  # rounding may swap neighbors
    assert trained["accuracy"] == np.mean((found > 0) == right) and trained["share_right"] == right.mean()
    counts = trained["counts"]
    assert counts["read"] == 360 and counts["held_out"] == {"problems": 15, "completions": len(right), "right": int(right.sum())}
    assert counts["train"]["problems"] == 45 and trained["tokens"] > 0 and trained["train_loss"] < 0.3


def test_labels_that_cannot_be_told_give_an_auc_of_about_a_half(world: World):
    folder = write_samples(world.root / "noise", shuffled, n_problems=150)
    result = verify(world, "noise-verifier", [folder], change(RECIPE, "verifier", held_out_fraction=0.5, epochs=2))
    assert 0.38 < result["auc"] < 0.62
    held_out = verifier.held_out_problems([f"p{i}" for i in range(150)], 0.5)
    found, right = scored_again(world.root / "noise-verifier", [folder], held_out)
    assert result["auc"] == pytest.approx(roc_auc_score(right, found), abs=2e-3)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_against_scikit_learn(ties):
    generator = np.random.default_rng(0)
    for _ in range(20):
        n = int(generator.integers(2, 60))
        right = np.concatenate([[True, False], generator.random(n) < 0.3])
        logits = generator.integers(0, 4, n + 2) if ties else generator.normal(size=n + 2)
        assert verifier.area_under_curve(logits.astype(np.float32), right) == pytest.approx(
            roc_auc_score(right, logits.astype(np.float32)), abs=1e-12
        )
    with pytest.raises(ValueError, match="both must be at least 1"):
        verifier.area_under_curve(np.zeros(3, np.float32), np.ones(3, bool))


def test_the_loss_is_the_mean_cross_entropy_of_the_rows_that_count(world: World):
    """Against float64; rows that fill a batch up change nothing."""
    base = load_model(world.root / "base")
    head = np.random.default_rng(0).normal(size=base.config.d_model).astype(np.float32)
    model = with_head(base.config, base.params, jnp.asarray(head))
    rows, _ = encode_answers(base.tokenizer, ["the cat"] * 3, ["red", "a tree", "é"], max_length=32, bos=False)
    tokens, lengths = verifier.pad_rows(rows, length=32, batch_size=5)
    labels = np.array([1, 0, 1, 0, 0], np.float32)
    _, activations = base(tokens, capture=("final_norm",))
    logits = [np.asarray(activations["final_norm"], np.float64)[i, len(row) - 1] @ head.astype(np.float64) for i, row in enumerate(rows)]
    expected = np.mean([np.log1p(np.exp(-z if y else z)) for z, y in zip(logits, labels)])
    hyper = hyper_parameters(weight_decay=0.0, peak_lr=1e-3, warmup=1, total=4)
    for parts in (1, 5):
        settings = verifier.step_settings(change(CONFIG, "verifier", batch_size=5, grad_accum_steps=parts), model.config, make_mesh(CONFIG.mesh))
        batch = {"tokens": tokens, "lengths": lengths, "labels": labels}
        _, metrics = jax.jit(make_train_step(settings))(initial_state(settings, model.params), batch, hyper)
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5) and int(metrics["tokens"]) == sum(map(len, rows))


def test_resume_is_bitwise(world: World, samples, trained, monkeypatch):
    real = verifier._batches
    with monkeypatch.context() as patch:
        patch.setattr(verifier, "_batches", lambda *args: killed_after(real(*args), 33))
        with pytest.raises(Killed):
            verify(world, "cut", samples)
    resumed = []
    with monkeypatch.context() as patch:
        patch.setattr(verifier, "starting_state", lambda *args, **options: resumed.append(real_start(*args, **options)) or resumed[-1])
        again = verify(world, "cut", samples)
    assert resumed[0][1] > 0
    timed = {"seconds"}
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in trained.items() if k not in timed}
    assert untimed(world.root / "cut") == untimed(world.root / "told")
    for a, b in zip(state_of(world.root / "cut", again["steps"]), state_of(world.root / "told", trained["steps"]), strict=True):
        assert np.array_equal(a, b)


real_start = verifier.starting_state


def test_the_last_step_needs_no_optimizer_that_was_dropped(world: World, samples, trained):
    shutil.copytree(world.root / "told", world.root / "dropped")
    drop_optimizer(world.root / "dropped" / "checkpoints")
    (world.root / "dropped" / DONE).unlink()
    again = verify(world, "dropped", samples)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in trained.items() if k != "seconds"}


def test_texts_of_several_members_count_once(world: World, samples, trained):
    """A member that wrote the very same texts changes nothing."""
    twice = verify(world, "told-twice", [*samples, samples[0]])
    assert twice["counts"] == trained["counts"] | {"read": 540} and twice["auc"] == trained["auc"]


@pytest.mark.parametrize("correct", [True, False])
def test_one_class_alone_teaches_nothing_and_says_so(world: World, correct):
    folder = write_samples(world.root / f"all-{correct}", lambda generator: (words(generator), correct), n_problems=8)
    result = verify(world, f"one-{correct}", [folder])
    assert result["auc"] is None and result["diverged"] is None and ("right" if correct else "wrong") in result["reason"] and result["steps"] == 0
    model, _ = load_verifier(world.root / f"one-{correct}")
    assert not np.any(model.params["head"])
    assert jax.tree.structure(model.params) == jax.tree.structure(abstract_scalar_params(without_output(CONFIG.model)))


def test_a_learning_rate_that_breaks_it_is_a_diverged_run_and_no_scorer(world: World, samples):
    config = dataclasses.replace(change(RECIPE, "verifier", peak_lr=1e9), train=dataclasses.replace(RECIPE.train, max_loss=1.0))
    result = verify(world, "broken", samples, config)
    assert result["diverged"] and result["auc"] is None
    with pytest.raises(UserError, match="diverged"):
        load_verifier(world.root / "broken")


def test_bad_samples_are_refused_in_one_line(world: World, samples):
    folder = write_samples(world.root / "bad", separable, n_problems=3)
    lines = (folder / "completions.jsonl").read_text().splitlines()
    cases = {
        "has no 'ended'": [lines[0].replace('"ended"', '"over"'), *lines[1:]],
        "which problems.jsonl does not hold": [lines[0].replace("p0", "q0"), *lines[1:]],
        "not as many as of the others": lines[:-1],
    }
    for words_, content in cases.items():
        (folder / "completions.jsonl").write_text("\n".join(content) + "\n")
        with pytest.raises(UserError, match=words_) as error:
            verify(world, "refused", [folder])
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no graded samples"):
        verify(world, "refused", [])
    with pytest.raises(UserError, match="at least one must be held out"):
        verify(world, "refused", [write_samples(world.root / "one", separable, n_problems=1)])
    with pytest.raises(UserError, match="not of stage verifier"):
        load_verifier(world.root / "base")
