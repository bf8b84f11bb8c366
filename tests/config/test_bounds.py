"""Numbers and names that no study can mean are refused where a config enters, with the value, the rule and the way out."""

import pytest

from plasticity_jax.config import grid_members, load_config
from plasticity_jax.errors import UserError

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
