"""Whole fine-tuning runs."""

import dataclasses

import jax
import numpy as np
import pytest
from test_pretrain import Killed, killed_after, state_of, untimed
from worlds import CONFIG, World, change

from plasticity_jax.config import TaskConfig
from plasticity_jax.data.tasks import format_prompt
from plasticity_jax.errors import UserError
from plasticity_jax.model.load import load_model
from plasticity_jax.train import finetune
from plasticity_jax.train.step import compile_train_step


@pytest.fixture(scope="module")
def tuned(world: World):
    config = dataclasses.replace(change(CONFIG, "finetune", peak_lr=2e-2), tasks={"topic": TaskConfig(epochs=30)})
    return world.finetune("tuned", "base", config)


def test_it_learns_a_trivial_mapping(world: World, tuned):
    """Greedy answers of the tuned model are right, those of its base are not."""
    model = load_model(world.root / "tuned")
    assert tuned["diverged"] is None and tuned["train_loss"] < 0.05 and tuned["rows"] == 40 and tuned["cut_rows"] == 0
    for prompt, answer in (("r", "red"), ("the t", "tree")):
        for path, right in (("tuned", True), ("base", False)):
            tokens = model.tokenizer.encode(format_prompt(prompt))
            start = len(tokens)
            for _ in range(6):
                logits, _ = load_model(world.root / path)([tokens], capture=())
                tokens.append(int(np.argmax(logits[0, -1])))
            continuation = tokens[start:]
            if model.tokenizer.eos_id in continuation:
                continuation = continuation[: continuation.index(model.tokenizer.eos_id)]
            assert (model.tokenizer.decode(continuation) == answer) is right


def test_numbers_of_a_run(world: World, tuned):
    base, model = load_model(world.root / "base"), load_model(world.root / "tuned")
    flat = [np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(m.params)]) for m in (base, model)]
    assert tuned["relative_update"] == pytest.approx(np.linalg.norm(flat[1] - flat[0]) / np.linalg.norm(flat[0]), rel=1e-6)
    rows = finetune.read_task(world.task)[0]
    assert tuned["tokens"] == 30 * sum(len(model.tokenizer.encode(row.response)) + 1 for row in rows)
    assert [row["step"] for row in untimed(world.root / "tuned")][-1] == tuned["steps"]
    assert (world.root / "tuned" / "tokenizer.json").read_bytes() == (world.corpus / "tokenizer.json").read_bytes()


def test_resume_is_bitwise(world: World, monkeypatch):
    whole = world.finetune("whole", "base", CONFIG)
    real = finetune._batches
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "_batches", lambda *args: killed_after(real(*args), 9))
        with pytest.raises(Killed):
            world.finetune("killed-tune", "base", CONFIG)
    seen = []
    monkeypatch.setattr(finetune, "_batches", lambda rows, schedule, *args: seen.append(len(schedule)) or real(rows, schedule, *args))
    again = world.finetune("killed-tune", "base", CONFIG)
    assert seen == [whole["steps"] - 8]
    for a, b in zip(state_of(world.root / "whole", whole["steps"]), state_of(world.root / "killed-tune", whole["steps"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert untimed(world.root / "whole") == untimed(world.root / "killed-tune")
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in whole.items() if k != "seconds"}


def test_runs_share_their_compiled_steps(world: World, tuned):
    """Another base, another seed and another number of steps compile nothing new."""
    from plasticity_jax.parallel.mesh import make_mesh

    mesh = make_mesh(CONFIG.mesh)
    step = compile_train_step(finetune.step_settings(CONFIG, CONFIG.model, mesh), mesh, members=False)
    before = step._cache_size()
    world.finetune("other", "free", CONFIG, seed=5)
    assert step._cache_size() == before > 0


def test_another_architecture_is_refused(world: World):
    with pytest.raises(UserError, match=r"model\.d_ff=64 is 32 in .*base"):
        world.finetune("misfit", "base", change(CONFIG, "model", d_ff=64))
