"""Numbers and names that no study can mean are refused where a config enters, with the value, the rule and the way out."""

import pytest

from plasticity_jax.cli import main
from plasticity_jax.config import grid_members, load_config
from plasticity_jax.errors import UserError
from plasticity_jax.study.execute import check_start
from plasticity_jax.study.graph import build_graph

TINY = "configs/tiny.py"


def refused(key: str, value) -> str:
    with pytest.raises(UserError) as error:
        load_config(TINY, [(key, value)])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


SEEDS = ("grid.seeds", "finetune.seeds", "evaluate.seed", "report.seed", "gap.seed", "probe.seed", "verifier.seed")


@pytest.mark.parametrize("seed", [-1, 2**32, 10**400], ids=["negative", "33 bits", "400 digits"])
@pytest.mark.parametrize("key", SEEDS)
def test_a_seed_is_a_word_of_32_bits(key, seed):
    assert key in refused(key, (seed,) if key.endswith("seeds") else seed)
    largest = 2**32 - 1
    load_config(TINY, [(key, (largest,) if key.endswith("seeds") else largest)])


@pytest.mark.parametrize(
    "key, value",
    [
        ("train.steps", 10**400),
        ("train.batch_size", 2**60),
        ("report.bootstrap_samples", 2**63),
        ("tasks.addition2.epochs", 10**11),
        ("mesh.data", 10**30),
        ("model.d_model", 10**19),
        ("train.peak_lr", 10**400),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_that_no_machine_counts_to_is_refused(key, value):
    assert key.rpartition(".")[2] in refused(key, value)


def test_an_integer_of_thousands_of_digits_is_refused():
    assert "4,300 digits" in refused("train.steps", 10**5000)


def test_minus_zero_is_zero():
    assert str(load_config(TINY, [("grid.weight_decay", (-0.0, 0.1))]).grid.weight_decay[0]) == "0.0"
    assert "wd0 twice" in refused("grid.weight_decay", (0.0, -0.0, 0.1))


def test_a_seed_twice_and_a_long_name_are_refused():
    assert "finetune.seeds=(3, 3) lists 3 twice" in refused("finetune.seeds", (3, 3))
    assert "101 characters" in refused("name", "a" * 101)
    assert load_config(TINY, [("name", "a" * 100)]).name == "a" * 100


def test_members_are_left_out_by_name():
    given = [("grid.weight_decay", (0.0, 0.1, 1.0)), ("grid.seeds", (0, 1)), ("grid.leave_out", ("^wd1-s1$",))]
    names = [member.name for member in grid_members(load_config(TINY, given))]
    assert names == ["wd0", "wd0.1", "wd1", "wd0-s1", "wd0.1-s1"]
    assert "matches no member" in refused("grid.leave_out", ("wd7",))
    assert "leaves no member" in refused("grid.leave_out", (".",))
    assert "not a regular expression" in refused("grid.leave_out", ("(",))


def test_a_grid_of_millions_is_refused_before_it_is_listed():
    values = tuple(float(number) for number in range(1, 101))
    fields = (("train.peak_lr", values), ("train.eps", values), ("train.clip_norm", values))
    assert "the grid has 4,000,000 members" in refused("grid.fields", fields) or "2,000,000 members" in refused("grid.fields", fields)


@pytest.mark.parametrize(("key", "value"), [("train.batch_size", 10**6), ("finetune.batch_size", 10**6), ("evaluate.batch_size", 10**9)])
def test_what_takes_many_times_the_memory_of_the_machine_is_refused_before_anything_is_written(tmp_path, key, value):
    given = [(key, value), ("train.compute_dtype", "float32"), ("train.loss_chunks", 1), ("evaluate.max_length", 4096)]
    config = load_config(TINY, [(name, str(one)) for name, one in given])
    runs = [run for run in build_graph(config) if run.stage in ("pretrain", "finetune", "evaluate")]
    with pytest.raises(UserError, match=rf"{key.split('.')[0].replace('train', 'pretrain')}.* would take about .* GiB of memory per device.*; lower"):
        check_start(config, tmp_path / "work", runs)
    assert not (tmp_path / "work").exists()


def test_what_a_message_quotes_cannot_break_its_line():
    said = str(UserError("a\nb\0c\u202ed\ud800e" + "x" * 5000 + "; the way out."))
    assert said.startswith("a\\nb\\x00c\\u202ed\\ud800e") and said.endswith("; the way out.") and len(said) < 1010
    assert str(UserError("λ=0.1: “é” fits")) == "λ=0.1: “é” fits"


@pytest.mark.parametrize("place", ["a\0b", "x" * 256, "a/" * 2000, "\udcff", "~nobody-here/x"])
@pytest.mark.parametrize("flag", ["--workdir", "--config"])
def test_a_path_that_no_file_can_have(flag, place, capsys):
    argv = {"--config": TINY, "--workdir": "work"} | {flag: place}
    assert main(["study", "--dry-run", *(word for pair in argv.items() for word in pair)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
