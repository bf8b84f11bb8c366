"""Every config file against its golden dump, so that no default drifts unnoticed, and the paper's against the numbers of the paper.

After a change that is meant:  python tests/test_paper_configs.py   writes the dumps anew; read their diff.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plasticity_jax.config import StudyConfig, grid_members, load_config, member_config, to_dict
from plasticity_jax.model.presets import presets

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "configs"
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
PAPER = [name for name in FILES if name.startswith(("llama", "olmo2"))]
FAITHFUL = ["llama_1b_20tpp", "llama_4b_20tpp"]


def load(name: str, *, faithful: bool = False) -> StudyConfig:
    return load_config(ROOT / "configs" / f"{name}.py", [("faithful", "True")] if faithful else [])


def lines(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from lines(inner, f"{path}.{key}" if path else key)
    else:
        yield f"{path} = {value!r}"


def dump(config: StudyConfig) -> str:
    """One line per field, then one per member with its decay, timescale and what it changes."""
    members = [
        f"member {m.name}: weight_decay {m.weight_decay:.6g}, timescale {m.timescale and round(m.timescale, 6)}"
        + "".join(f", {k} {v!r}" for k, v in m.overrides + m.changes)
        for m in grid_members(config)
    ]
    return "\n".join([*lines(to_dict(config)), *members]) + "\n"


CASES = [(name, False) for name in FILES] + [(name, True) for name in FAITHFUL]


def golden(name: str, faithful: bool) -> Path:
    return GOLDEN / f"{name}{'-faithful' if faithful else ''}.txt"


@pytest.mark.parametrize("name, faithful", CASES)
def test_config_equals_its_golden_dump(name, faithful):
    assert dump(load(name, faithful=faithful)) == golden(name, faithful).read_text(encoding="utf-8")


def test_every_dump_belongs_to_a_config():
    assert {path.name for path in GOLDEN.iterdir()} == {golden(*case).name for case in CASES}


# λ, tokens, sequences per batch, steps, peak rate, timescales of the run at some λ: paper sections 3.2, 3.4 and 9.
TABLE = {
    "llama_0p5b_20tpp": (
        (0, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1, 1.5, 3, 10),
        10e9,
        512,
        9536,
        2.5e-4,
        {0.1: 4.19, 0.5: 0.84, 1: 0.42, 3: 0.14, 10: 0.042},
    ),
    "llama_1b_20tpp": ((0, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1, 1.5, 3, 10), 20e9, 512, 19073, 2e-4, {0.1: 2.62, 0.5: 0.52, 1: 0.26, 3: 0.087, 10: 0.026}),
    "llama_4b_20tpp": ((0, 0.1, 1), 80e9, 1024, 38146, 1.5e-4, {0.1: 1.75, 1: 0.17}),
    "olmo2_1b_20tpp": ((0, 0.1, 0.3, 0.6, 1), 30e9, 512, 14305, 4e-4, {0.1: 1.75, 0.3: 0.58, 0.6: 0.29, 1: 0.17}),
    "olmo2_1b_140tpp": ((0, 0.1, 0.3, 1), 210e9, 512, 100135, 4e-4, {0.1: 0.25, 0.3: 0.083, 1: 0.025}),
}


@pytest.mark.parametrize("name", TABLE)
def test_paper_configs_hold_the_papers_numbers(name):
    decays, tokens, batch, steps, peak_lr, timescales = TABLE[name]
    config = load(name)
    train = config.train
    assert (train.batch_size, train.steps, train.peak_lr) == (batch, steps, peak_lr)
    assert tokens - batch * train.seq_len < steps * batch * train.seq_len <= tokens
    assert tuple(m.weight_decay for m in grid_members(config)) == decays
    for decay, share in timescales.items():
        (found,) = (m.timescale for m in grid_members(config) if m.weight_decay == decay)
        assert found == pytest.approx(share, rel=0.035)  # the paper's table has two digits
    olmo2 = name.startswith("olmo2")
    assert (train.b1, train.b2, train.eps, train.clip_norm, train.z_loss) == (0.9, 0.95, 1e-8, 1.0, 1e-5 if olmo2 else 0.0)
    assert (config.decay.kind, config.decay.mask, train.seq_len) == ("coupled", "olmo" if olmo2 else "all", 4096 if olmo2 else 2048)
    assert (train.schedule, train.final_lr_share) == (("wsd", 0.0) if name == "olmo2_1b_140tpp" else ("cosine", 0.1))
    assert config.model in presets().values() and not config.data.isolate_documents and not config.faithful
    assert (config.finetune.peak_lr, config.finetune.batch_size, config.finetune.weight_decay) == (7.5e-6 if "4b" in name else 1e-5, 64, 0.0)


def test_the_learning_rate_grid_is_a_product():
    members = grid_members(load("olmo2_1b_lr_grid"))
    found = {(m.weight_decay, dict(m.overrides)["train.peak_lr"]) for m in members}
    assert found == {(decay, rate) for decay in (0.1, 0.6, 1.0) for rate in (2e-4, 4e-4, 8e-4)} and len(members) == 9


def test_faithful_batches_are_those_that_were_run():
    nominal, faithful = load("llama_1b_20tpp"), load("llama_1b_20tpp", faithful=True)
    assert (nominal.train.batch_size, nominal.train.steps, faithful.train.batch_size, faithful.train.steps) == (512, 19073, 1024, 9536)
    config = load("llama_4b_20tpp", faithful=True)
    found = {m.weight_decay: (own.train.batch_size, own.train.steps) for m in grid_members(config) if (own := member_config(config, m))}
    assert found == {0.0: (4096, 9536), 0.1: (1024, 38146), 1.0: (8192, 4768)}


@pytest.mark.parametrize("name", PAPER)
def test_docstring_says_command_steps_and_the_timescale_of_every_decay(name):
    text, config = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8"), load(name)
    document = text.split('"""')[1]
    assert f"plasticity study --config configs/{name}.py --workdir" in document and "Devices:" in document
    if "Base models:" in document:  # those of another config, which says the rest
        return
    assert f"{config.train.steps:,} steps of {config.train.batch_size} x {config.train.seq_len}" in document
    stated = re.search(r"Timescales:(.*)", document)[1]
    for member in grid_members(config):
        value = "none" if member.timescale is None else f"{float(f'{member.timescale:.3g}'):g}"
        assert re.search(rf"(λ |, ){member.weight_decay:g} {re.escape(value)}[,.;]", stated + "."), (member.name, value)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        golden(*case).write_text(dump(load(case[0], faithful=case[1])), encoding="utf-8")
