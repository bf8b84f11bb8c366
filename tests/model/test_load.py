import jax
import numpy as np
import pytest

from plasticity_jax.config import ModelConfig, StudyConfig
from plasticity_jax.errors import UserError
from plasticity_jax.model import Checkpoints, apply, init_params, load_model
from plasticity_jax.runs.directory import DONE, RunDirectory
from plasticity_jax.runs.jsonfiles import write_json
from plasticity_jax.runs.run import Run

CONFIG = ModelConfig(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=8)
PARAMS = init_params(CONFIG, 4)
TOKENS = [[1, 2, 3], [4, 5, 299]]


def make_run(path, stage="pretrain", finish=True, steps=(0,)):
    directory = RunDirectory(path)
    with directory.work(Run("study", stage, "wd0", {"x": 1}), StudyConfig(model=CONFIG)):
        if steps:
            with Checkpoints(path / "checkpoints", keep=9) as checkpoints:
                for step in steps:
                    checkpoints.save(step, {**PARAMS, "head": {"kernel": PARAMS["head"]["kernel"] + step}})
        if finish:
            directory.finish({})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run") / "wd0")


@pytest.fixture(scope="module")
def model(run):
    return load_model(run)


def test_a_run_opens_and_computes_what_apply_does(model, run):
    assert model.config == CONFIG and model.path == run and model.run.stage == "pretrain" and model.tokenizer is None
    logits, activations = model(TOKENS)
    expected, captured = jax.jit(lambda: apply(CONFIG, PARAMS, np.array(TOKENS), capture=("embed", "block_out")))()
    np.testing.assert_allclose(logits, expected, atol=1e-6)
    assert set(activations) == {"embed", "block_out"}
    np.testing.assert_allclose(activations["block_out"], captured["block_out"], atol=1e-6)
    segments = [[1, 1, 2], [1, 2, 2]]
    masked, nothing = model(TOKENS, segment_ids=segments, positions=[[0, 1, 0], [0, 0, 1]], capture=())
    assert nothing == {} and not np.allclose(masked, logits)


def test_matrices_in_bf16_give_what_casting_in_every_product_gives(run, model):
    narrow = load_model(run, dtype="bfloat16")
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(narrow.params)}
    assert kinds == {"bfloat16", "float32"} and str(narrow.params["final_norm"]["scale"].dtype) == "float32"
    expected, _ = jax.jit(lambda: apply(CONFIG, PARAMS, np.array(TOKENS), compute_dtype="bfloat16"))()
    np.testing.assert_array_equal(narrow(TOKENS, capture=())[0], expected)
    assert np.abs(np.asarray(expected) - np.asarray(model(TOKENS, capture=())[0])).max() > 0
    with pytest.raises(UserError, match="dtype='float16' is not one that models are run in; give 'float32' or 'bfloat16'"):
        load_model(run, dtype="float16")


def test_the_last_step_is_read(tmp_path):
    model = load_model(make_run(tmp_path / "run", steps=(2, 10)))
    np.testing.assert_array_equal(model.params["head"]["kernel"], PARAMS["head"]["kernel"] + 10)


def test_a_kept_step_is_read_and_another_is_refused(tmp_path):
    run = make_run(tmp_path / "run", steps=(2, 10))
    np.testing.assert_array_equal(load_model(run, step=2).params["head"]["kernel"], PARAMS["head"]["kernel"] + 2)
    with pytest.raises(UserError, match=r"step=3 is not in .*checkpoints, which holds 2, 10; train.keep_steps keeps more\."):
        load_model(run, step=3)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([1, 2], r"tokens has shape \[2\]; it must be a non-empty \[B, T\]"),
        ([[]], r"shape \[1, 0\]"),
        ([[1, 300]], r"tokens hold 300, outside the vocabulary 0 \.\.\. 299"),
        ([[-1]], "tokens hold -1"),
        ([[0.5]], "type float64; it must hold integers"),
        ([[1], [1, 2]], "rows of different lengths"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_in_one_line(model, tokens, message):
    with pytest.raises(ValueError, match=message) as caught:
        model(tokens)
    assert "\n" not in str(caught.value)


def test_segment_ids_of_another_shape_are_refused(model):
    with pytest.raises(ValueError, match=r"segment_ids has shape \[1, 3\]; it must have the shape of tokens, \[2, 3\]"):
        model(TOKENS, segment_ids=[[1, 1, 1]])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"finish": False}, "not finished"),
        ({"stage": "evaluate"}, "stage evaluate, which holds no model; give one of stage init, import, pretrain, finetune"),
        ({"steps": ()}, "has no checkpoints folder"),
    ],
)
def test_what_is_no_finished_model_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load_model(make_run(tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, damage):
    path = make_run(tmp_path / "run")
    largest = max((path / "checkpoints/0/params").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    data = bytearray(largest.read_bytes())
    if damage == "delete":
        largest.unlink()
    elif damage == "truncate":
        largest.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0xFF
        largest.write_bytes(data)
    if damage != "flip":  # of arrays, only the lengths are looked at when a run is opened
        with pytest.raises(UserError, match="since the run finished.* delete .* and run again"):
            load_model(path)
    write_json(path / DONE, {"diverged": ""})  # as one from before there were checksums
    with pytest.raises(UserError, match="checkpoint .*/checkpoints/0 cannot be read .* delete the run's directory") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
