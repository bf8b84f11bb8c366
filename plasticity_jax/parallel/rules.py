"""Values by parameter name: an ordered list of (regex over the parameter's path, value)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax


def param_paths(tree: Any) -> list[str]:
    """Returns the paths of the leaves of a nested dict, such as `blocks/attn/q/kernel`, in the order of `jax.tree.leaves`."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def match_rules(rules: Sequence[tuple], tree: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    """Maps each path, in order, to the value of the first rule whose regex matches it (`re.search`).

    Args:
      rules: tuples (regex, value) or (regex, value, optional). An optional rule may match nothing.
      tree: a parameter tree, or its paths.
    Raises:
      ValueError: no rule covers a path, or a rule that is not optional matches no path.
    """
    paths = param_paths(tree) if isinstance(tree, Mapping) else list(tree)
    table = {}
    for path in paths:
        values = [rule[1] for rule in rules if re.search(rule[0], path)]
        if not values:
            raise ValueError(f"parameter {path} is not covered by any rule; add one for it, or a last rule '.*'.")
        table[path] = values[0]
    for pattern, _, *optional in rules:
        if not any(optional) and not any(re.search(pattern, path) for path in paths):
            raise ValueError(f"rule {pattern!r} matches no parameter; correct it, or mark it optional with (regex, value, True).")
    return table
