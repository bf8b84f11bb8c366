"""Who may import whom when a module is loaded: study, report → stages → {train, evaluate, analysis} → {model, data, parallel} → {config, runs}."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "plasticity_jax"
LAYERS = [("completion", "errors", "plugins", "progress", "terminal", "text", "_lazy"), ("config", "runs"), ("model", "data", "parallel"), ("train", "evaluate", "analysis"), ("stages",),
          ("study", "report"), ("cli",)]  # fmt: skip
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
APART = {"train", "evaluate", "analysis"}  # do not import each other: what needs training is a node of the graph


def imported(tree: ast.Module) -> set[str]:
    """The parts of the package that a module imports when it is loaded: not inside of functions, and not for type checkers only."""
    found = set()
    for node in tree.body:
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name and name.startswith("plasticity_jax.")}
    return found


def test_no_module_imports_a_layer_above_its_own():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imported(ast.parse(path.read_text(encoding="utf-8"))) - {own}:
            if own in LAYER and (LAYER[other] > LAYER[own] or {own, other} <= APART):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not wrong


def test_every_part_of_the_package_has_a_layer():
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert parts - {"__init__", "__main__"} == set(LAYER)
