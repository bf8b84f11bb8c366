"""Completions of a study, to read: by member, task, when, and verdict."""

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from plasticity_jax.config import grid_members, restore_config
from plasticity_jax.errors import UserError
from plasticity_jax.runs.directory import COMPLETIONS, OPTIONS, PROBLEMS, REWARDS, RunDirectory
from plasticity_jax.runs.jsonfiles import damaged, iter_jsonl
from plasticity_jax.runs.run import Run
from plasticity_jax.runs.storage import AnyPath
from plasticity_jax.stages.evaluate import is_regraded
from plasticity_jax.study.graph import read_study, runs_beside, study_files


@dataclass(frozen=True)
class Filter:
    """Which completions are wanted; None takes all.

    Attributes:
      member, task, problem: a member's name, a task, the id of a problem.
      weight_decay: λ of the member, to four digits.
      when: "before" or "after" fine-tuning.
      verdict: "right", "wrong", "no answer" or "timed out".
      samples: the sampled completions besides the greedy one.
    """

    member: str | None = None
    weight_decay: float | None = None
    task: str | None = None
    when: str | None = None
    verdict: str | None = None
    problem: str | None = None
    samples: bool = False

    def takes_run(self, run: Run, decay: float | None) -> bool:
        of_decay = self.weight_decay is None or (decay is not None and f"{decay:.4g}" == f"{self.weight_decay:.4g}")
        wanted = ((self.member, run.member), (self.task, run.task), (self.when, run.fields.get("when")))
        return run.stage == "evaluate" and of_decay and all(asked in (None, has) for asked, has in wanted)

    def takes(self, row: dict[str, Any]) -> bool:
        return all(asked in (None, has) for asked, has in ((self.verdict, row["verdict"]), (self.problem, row["id"])))


def browse(workdir: AnyPath, wanted: Filter) -> Iterator[dict[str, Any]]:
    """Rows of the finished evaluate runs of the studies below a workdir, one per completion; where options were compared, one per problem. Also of those
    that a command was asked for by itself, whose weight_decay is None unless they are of a member of the grid.

    Yields:
      study, member, weight_decay, task, when, seed, id, sample (0 is greedy), prompt, gold, text, answer, verdict, reward (None where there is none).
    Raises:
      UserError: no study there, or a member, λ or task that none of them has.
    """
    studies = [(path, *_study(path)) for path in study_files(workdir)]
    runs = [run for _, _, of_study in studies for run in of_study if run.stage == "evaluate"]
    _check("member", wanted.member, [run.member for run in runs])
    _check("task", wanted.task, [run.task for run in runs])
    if wanted.weight_decay is not None:
        known = [decay for _, decays, _ in studies for decay in decays.values() if decay is not None]
        _check("weight-decay", f"{wanted.weight_decay:.4g}", [f"{decay:.4g}" for decay in known])
    for path, decays, of_study in studies:
        with damaged(path):
            yield from _of_study(path, of_study, decays, wanted)


def _study(path: AnyPath) -> tuple[dict[str | None, float | None], list[Run]]:
    """(name of a member, or of its base model → λ; the runs of a study and those beside it). Completions that were graded again would come twice."""
    tree, runs = read_study(path)
    with damaged(path):
        members = grid_members(restore_config(tree.get("config", {})))
        decays: dict[str | None, float | None] = {name: member.weight_decay for member in members for name in (member.base, member.name)}
    return decays, [*runs, *(other.run for other in runs_beside(path) if not other.stale and not is_regraded(other.run))]


def _of_study(path: AnyPath, of_study: list[Run], decays: dict[str | None, float | None], wanted: Filter) -> Iterator[dict[str, Any]]:
    rewards = {run.parents["completions"]: path.parent / run.id for run in of_study if run.stage == "reward"}
    for run in of_study:
        decay = decays.get(run.member)
        if wanted.takes_run(run, decay) and _is_whole(path.parent / run.id):
            about = {"study": run.study, "member": run.member, "weight_decay": decay, "task": run.task, "when": run.fields["when"], "seed": run.seed}
            for row in _rows(path.parent / run.id, rewards.get(run.id), greedy=not wanted.samples):
                if wanted.takes(row):
                    yield about | row


def completions(folder: AnyPath, *, greedy: bool) -> Iterator[dict[str, Any]]:
    """The completions of an evaluate run with prompt and gold answer, in order; only the greedy ones, or all."""
    problems = {row["id"]: row for row in _lines(folder / PROBLEMS)}
    for row in _lines(folder / COMPLETIONS):
        if not greedy or row["sample"] == 0:
            yield row | {name: problems[row["id"]][name] for name in ("prompt", "gold")}


def _rows(folder: AnyPath, rewards: AnyPath | None, *, greedy: bool) -> Iterator[dict[str, Any]]:
    if (folder / OPTIONS).is_file():
        problems = {row["id"]: row for row in _lines(folder / PROBLEMS)}
        for row in _lines(folder / OPTIONS):
            problem, chosen = problems[row["id"]], row["options"][row["chosen"]]
            yield {
                "id": row["id"],
                "sample": 0,
                "prompt": problem["prompt"],
                "gold": row["options"][row["right"]],
                "text": chosen,
                "answer": chosen,
                "verdict": "right" if row["correct"] else "wrong",
                "reward": None,
            }
    elif (folder / COMPLETIONS).is_file():
        found = {} if rewards is None or not _is_whole(rewards) else {(row["id"], row["sample"]): row["reward"] for row in _lines(rewards / REWARDS)}
        for row in completions(folder, greedy=greedy):
            yield {name: row[name] for name in ("id", "sample", "prompt", "gold", "text", "answer", "verdict")} | {
                "reward": found.get((row["id"], row["sample"]))
            }


def _is_whole(folder: AnyPath) -> bool:
    """Whether a run is finished. Raises UserError if one of its files has changed since."""
    directory = RunDirectory(folder)
    if not directory.done:
        return False
    directory.check_whole()
    return True


def _lines(path: AnyPath) -> Iterator[dict[str, Any]]:
    return iter_jsonl(path) if path.is_file() else iter(())


def _check(flag: str, asked: Any, known: list[Any]) -> None:
    if asked is not None and asked not in known:
        raise UserError(f"--{flag}={asked} has no completions here; there are {', '.join(map(str, dict.fromkeys(known))) or 'none'}.")


def text_of(row: dict[str, Any]) -> str:
    """A row for the terminal: whose it is, the prompt, the completion, the verdict."""
    sample = "greedy" if row["sample"] == 0 else f"sample {row['sample']}"
    reward = "" if row["reward"] is None else f", reward {float(row['reward']):.3f}"
    decay = "" if row["weight_decay"] is None else f" (λ {row['weight_decay']:.4g})"
    head = f"── {row['member']}{decay}  {row['task']}  {row['when']}  {row['id']}  {sample}"
    verdict = f"[{row['verdict']}: {row['answer'] if row['answer'] is not None else '–'}, gold {row['gold']}{reward}]"
    return "\n".join([head, _plain(f"{row['prompt']}▸{row['text']}"), _plain(verdict), ""])


def _plain(text: str) -> str:
    """Without the control characters that a model may write and a terminal would obey."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}" for c in text)
