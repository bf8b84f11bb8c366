import pytest
from hypothesis import given
from hypothesis import strategies as st

from plasticity_jax.config import ModelConfig
from plasticity_jax.model import abstract_params
from plasticity_jax.parallel import match_rules, param_paths

TREE = {"embed": {"embedding": 0}, "blocks": {"attn": {"q": {"kernel": 1}}, "norm": {"scale": 2}}}


def test_paths_join_keys_by_slashes_in_leaf_order():
    assert param_paths(TREE) == ["blocks/attn/q/kernel", "blocks/norm/scale", "embed/embedding"]


def test_first_matching_rule_wins():
    rules = [(r"attn/.*kernel", "a"), (r"kernel$", "b", True), (r".*", "c")]
    assert match_rules(rules, TREE) == {"blocks/attn/q/kernel": "a", "blocks/norm/scale": "c", "embed/embedding": "c"}


def test_uncovered_parameter_is_named():
    with pytest.raises(ValueError, match="parameter embed/embedding is not covered by any rule"):
        match_rules([(r"^blocks/", 1)], TREE)


def test_rule_that_matches_nothing_is_named_unless_optional():
    with pytest.raises(ValueError, match="rule '\\^head/' matches no parameter"):
        match_rules([(r"^head/", 0), (r".*", 1)], TREE)
    assert set(match_rules([(r"^head/", 0, True), (r".*", 1)], TREE).values()) == {1}


@given(st.lists(st.text("abc/", min_size=1, max_size=6), unique=True, min_size=1, max_size=8), st.text("abc", min_size=1, max_size=2))
def test_every_path_gets_the_value_of_its_first_rule(paths, pattern):
    table = match_rules([(pattern, "first", True), (r"", "rest")], paths)
    assert list(table) == paths
    assert all(value == ("first" if pattern in path else "rest") for path, value in table.items())


def test_paths_may_stand_for_the_tree():
    abstract = abstract_params(ModelConfig())
    assert match_rules([("", 0)], abstract) == match_rules([("", 0)], param_paths(abstract))
