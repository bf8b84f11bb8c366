"""What identifies a run: the stage, what defines its result, and its parents."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from plasticity_jax.runs.jsonfiles import to_json


@dataclass(frozen=True)
class Run:
    """One node of a study's graph.

    Attributes:
      study: the study's name.
      stage: name of its stage; "import" for a model from elsewhere.
      name: readable name, unique within the stage together with the hash.
      fields: what defines the result, besides the parents.
      parents: role (such as "base", "task") → id of the run that plays it.
      member, task, seed: what the run is about; None where it does not apply.
      version: of the stage's code.
    """

    study: str
    stage: str
    name: str
    fields: dict[str, Any]
    parents: dict[str, str] = field(default_factory=dict)
    member: str | None = None
    task: str | None = None
    seed: int | None = None
    version: int = 1

    @property
    def hash(self) -> str:
        """First eight hex digits of the sha256 over stage, version, fields and the parents' hashes."""
        parents = {role: parent.rsplit("-", 1)[1] for role, parent in sorted(self.parents.items())}
        text = json.dumps(json.loads(to_json([self.stage, self.version, self.fields, parents])), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def task_name(self) -> str:
        """The task. Raises ValueError for a run that is for none."""
        if self.task is None:
            raise ValueError(f"run {self.id} is for no task")
        return self.task

    @property
    def id(self) -> str:
        """`<stage>/<name>-<hash8>`, which is also the run's path below the study's folder."""
        return f"{self.stage}/{self.name}-{self.hash}"

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Run":
        """The run that `to_dict` wrote. Raises KeyError or TypeError for anything else."""
        run = cls(**{f.name: tree[f.name] for f in dataclasses.fields(cls) if f.name in tree or f.default is dataclasses.MISSING})
        for name, kinds in _KINDS.items():
            if type(getattr(run, name)) not in kinds:
                raise TypeError(f"{name} is {type(getattr(run, name)).__name__}")
        if not all(type(parent) is str and "-" in parent for parent in run.parents.values()):
            raise TypeError("a parent is no id of a run")
        return run


_KINDS = {"study": (str,), "stage": (str,), "name": (str,), "fields": (dict,), "parents": (dict,), "version": (int,)} | {
    name: (str, type(None)) for name in ("member", "task")
}  # fmt: skip
