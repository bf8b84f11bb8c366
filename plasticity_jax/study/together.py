"""Which runs are carried out as one program: what `grid.mode` comes to on these devices."""

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from plasticity_jax.config import StudyConfig, to_dict
from plasticity_jax.errors import UserError
from plasticity_jax.runs.jsonfiles import to_json
from plasticity_jax.runs.run import Run
from plasticity_jax.stages import stages

if TYPE_CHECKING:
    from jax.sharding import Mesh

log = logging.getLogger("plasticity_jax")

# Section → fields in which runs may differ that one compiled program serves, because it takes them as arguments, or its length has no part in it.
_TRACED = {
    "train": ("peak_lr", "warmup_fraction", "steps"),
    "finetune": ("peak_lr", "warmup_fraction", "weight_decay"),
    "verifier": ("peak_lr", "warmup_fraction", "weight_decay"),
    "data": ("max_tokens",),
}
MEMORY_SHARE = 0.5  # of a device, which `grid.mode = "auto"` fills with members; the estimate of a member is within 15%
FAR_TOO_MUCH = 2  # times the memory of a device: what an estimate is not wrong by


def shapes(config: StudyConfig) -> dict[str, Any]:
    """What the compiled programs of a member's config depend on."""
    tree = to_dict(config)
    del tree["grid"]  # the other members
    return tree | {section: {name: value for name, value in tree[section].items() if name not in fields} for section, fields in _TRACED.items()}


def grouped(runs: Sequence[Run], configs: dict[str, StudyConfig], todo: Collection[str]) -> list[list[Run]]:
    """The runs of `todo`, in groups that are carried out by one call each.

    With `grid.mode` "sequential" each by itself; with "vmapped" all together that one program can serve. With "auto" as many of these as fit in half of
    the memory of a device, by the estimate of their stage, where a device's memory is known; on CPUs one by one, because one model's products keep the
    cores busy already. A mesh with a member axis is for members together: each group then fills it.

    The groups depend on all `runs`, and not on which of them are done: a group that is interrupted resumes as the same program. Logs what "auto" came to.

    Args:
      configs: id of a run → the config to carry it out with.
      todo: ids of runs.
    """
    place = {run.id: number for number, run in enumerate(runs)}
    waiting = [(left, choice) for group, choice in _divided(runs, configs) if (left := [run for run in group if run.id in todo])]
    say_once(choice for _, choice in waiting)
    return sorted((group for group, _ in waiting), key=lambda group: place[group[0].id])


def _divided(runs: Sequence[Run], configs: dict[str, StudyConfig]) -> Iterator[tuple[list[Run], str]]:
    """All groups, each with what is to be said of its size."""
    from plasticity_jax.parallel.mesh import make_mesh

    for group in alike(runs, configs):
        own, size, choice = configs[group[0].id], 1, ""
        if len(group) > 1:
            size, choice = group_size(own, group, make_mesh(own.mesh))
        yield from ((group[start : start + size], choice) for start in range(0, len(group), size))


def say_once(choices: Iterable[str]) -> None:
    """Logs each of the different sentences that `group_size` returned."""
    for choice in dict.fromkeys(filter(None, choices)):
        log.info(choice)


def alike(runs: Sequence[Run], configs: dict[str, StudyConfig]) -> list[list[Run]]:
    """The runs by what one program can serve; each by itself with `grid.mode` "sequential"."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        batched, mode = stages()[run.stage].batched, configs[run.id].grid.mode
        found.setdefault(batched.key(run) if batched and mode != "sequential" else run.id, []).append(run)
    return list(found.values())


def check_groups(runs: Sequence[Run], configs: dict[str, StudyConfig]) -> None:
    """Refuses a mesh whose member axis does not divide the members of a program. Raises UserError."""
    from plasticity_jax.parallel.mesh import check_members, make_mesh

    for group, _ in _divided(runs, configs):
        check_members(make_mesh(configs[group[0].id].mesh), len(group))


def members_that_fit(members: int, bytes_of_one: int, limit: int, axis: int) -> int:
    """How many of the members to carry out together, as nearly equal groups as the member axis allows.

    Args:
      bytes_of_one: per device, of a member that has all devices.
      limit: bytes of a device that programs can use.
      axis: size of the mesh's member axis, over which members spread.
    """
    most = max(axis, int(MEMORY_SHARE * limit / bytes_of_one) // axis * axis)
    groups = -(-members // most)
    return min(members, -(-members // (groups * axis)) * axis)


def group_size(config: StudyConfig, group: Sequence[Run], mesh: "Mesh") -> tuple[int, str]:
    """How many runs of a group of alike ones are carried out together on this mesh; and for `grid.mode` "auto" a sentence that says why, else ""."""
    from plasticity_jax.parallel import hardware

    stage, members = stages()[group[0].stage], len(group)
    if config.grid.mode != "auto" or members == 1 or stage.batched is None:
        return members, ""
    axis, device = mesh.shape["member"], mesh.devices.flat[0]
    limit = None if device.platform == "cpu" else hardware.memory_of(device)
    if limit is None:
        size = members if axis > 1 else 1
        why = f"mesh.member={axis}" if axis > 1 else f"one by one on {device.device_kind}, whose memory is not known"
    else:
        of_one = stage.batched.bytes(config, mesh)
        size = members_that_fit(members, of_one, limit, axis)
        why = f"one takes about {of_one / 2**30:.2f} GiB of {limit / 2**30:.2f} per device, of which {MEMORY_SHARE:.0%} may be used"
    return size, f"grid.mode auto → {stage.name}: {size} of {members} alike runs as one program ({why})"


def check_memory(runs: Sequence[Run], configs: dict[str, StudyConfig]) -> None:
    """Refuses runs of a stage that would take far more memory than a device has. The estimate is rough, and so is the rule. Raises UserError."""
    from plasticity_jax.parallel import hardware
    from plasticity_jax.parallel.mesh import make_mesh

    seen = set()
    for run in runs:
        batched, config = stages()[run.stage].batched, configs[run.id]
        program = to_json([run.stage, shapes(config)])
        if batched is None or program in seen:
            continue
        seen.add(program)
        mesh = make_mesh(config.mesh)
        limit = hardware.memory_of(mesh.devices.flat[0])
        if limit is not None and (needed := batched.bytes(config, mesh)) > FAR_TOO_MUCH * limit:
            raise UserError(
                f"{run.id} would take about {needed / 2**30:,.1f} GiB of memory per device, and {mesh.devices.flat[0].device_kind} has "
                f"{limit / 2**30:,.1f}; lower the batch size or the lengths of its section, raise its grad_accum_steps, or spread it over more devices."
            )
