"""What a study reads from disk: what is there, what is missing, and the command that brings it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from plasticity_jax.config import StudyConfig
from plasticity_jax.config.grid import labeled_models
from plasticity_jax.data.corpus_files import Survey, survey
from plasticity_jax.data.named_tokenizers import NAMED, TRAINED
from plasticity_jax.data.tasks import get_task
from plasticity_jax.data.tasks.base import Origin
from plasticity_jax.data.tasks.originals import TFDS, find_places, split_places
from plasticity_jax.data.tasks.table import places
from plasticity_jax.data.token_files import find_token_files, listed
from plasticity_jax.data.wheels import Wheels, wheels_dir
from plasticity_jax.errors import UserError
from plasticity_jax.runs.storage import location
from plasticity_jax.stages.stage import Plan

# Field → where what it usually names is published (docs/data.md says which names are not certain); the sets of tasks say it themselves (`Task.sets`).
CORPORA = {"fineweb-edu": Origin("HuggingFaceFW/fineweb-edu", "sample/350BT/*"), "olmo-mix-1124": Origin("allenai/olmo-mix-1124")}
REWARD_MODEL = Origin("Skywork/Skywork-Reward-Llama-3.1-8B-v0.2", model=True)
MATHQA = Origin("regisss/math_qa", "*test*")


@dataclass(frozen=True)
class Needed:
    """Something that a study reads.

    Attributes:
      what: the config field, or the task and set, or the wheel.
      place: where the config says it lies.
      there: whether it is.
      found: files and bytes, or what is wrong.
      command: what brings it; "" where that is not known.
    """

    what: str
    place: str
    there: bool
    found: str
    command: str


def needed(config: StudyConfig) -> list[Needed]:
    """Everything that the runs of a study read, in the order of use; each once."""
    found = {(one.what, one.place): one for one in (*_corpus(config), *_wheels(config), *_sets(config), *_models(config))}
    return list(found.values())


def needed_lines(found: Iterable[Needed]) -> list[str]:
    """One line for what is there; for what is missing a second one with the command."""
    found, lines = list(found), []
    for one in found:
        lines.append(f"{'there  ' if one.there else 'MISSING'}  {one.what}: {one.place} ({one.found})")
        if not one.there:
            lines.append(f"         {one.command or 'its publisher is not known here; put it at this place'}")
    missing = sum(not one.there for one in found)
    return [*lines, f"{len(found) - missing} of {len(found)} there" + (f", {missing} missing; docs/data.md has sizes and hours" if missing else "")]


def _corpus(config: StudyConfig) -> Iterator[Needed]:
    data = config.data
    if (place := data.files) is not None:
        origin = next((origin for name, origin in CORPORA.items() if name in place), None)
        command = origin.command(place.split("/sample/")[0]) if origin else ""  # the repo's own folders lie below
        yield _listed("data.files", place, lambda: (survey(place) or Survey((), ())).files, command)
    if data.token_files is not None:
        places = data.token_files
        yield _listed("data.token_files", places, lambda: listed(find_token_files(places, data.token_dtype), data.token_dtype), "")
    if data.tfds is not None:
        yield _set("data.tfds", f"{TFDS}{data.tfds}@{data.tfds_split}", "")
    if data.tokenizer != TRAINED and data.tokenizer not in NAMED:
        path = location(data.tokenizer)
        yield Needed("data.tokenizer", data.tokenizer, path.exists(), "" if path.exists() else "no such file or folder", "")


def _listed(what: str, place: str, files, command: str) -> Needed:
    try:
        found = list(files())
    except UserError as error:
        return Needed(what, place, False, str(error), command)
    return Needed(what, place, bool(found), _amount(found) if found else "nothing there to read", command)


def _amount(files: Iterable[tuple[str, int]]) -> str:
    sizes = [size for _, size in files]
    return f"{len(sizes):,} file{'s' if len(sizes) != 1 else ''}, {sum(sizes) / 1e9:,.3f} GB"


def _wheels(config: StudyConfig) -> Iterator[Needed]:
    from plasticity_jax.stages import stages

    if config.grid.models and not all(one.there for one in _models(config)):
        return  # what the others need is known once they are all there
    runs = Plan(config, stages().values()).runs
    wheels = Wheels(wheels_dir(config.data.wheels))
    for package in sorted({package for run in runs for package in run.fields.get("wheels", ())}):
        try:
            wheels.check(package)
        except UserError as error:
            yield Needed(f"wheel {package}", str(wheels.directory), False, "not there", str(error).rpartition(" with: ")[2])
        else:
            yield Needed(f"wheel {package}", str(wheels.directory), True, "pinned by sha256", "")


def _sets(config: StudyConfig) -> Iterator[Needed]:
    of_tasks = [(name, get_task(name, config.tasks), places(task)) for name, task in config.tasks.items()]
    files = [(f"{name} {key}", found, task.sets.get(key)) for name, task, sets in of_tasks for key, found in sets.items()]
    files += [(f"zero_shot.files {name}", places, MATHQA) for name, places in config.zero_shot.files.items()]
    files += [
        (f"probe.files {name} {key}", place, None)
        for name, each in config.probe.files.items()
        for key, place in (("train", each.train), ("test", each.test))
        if place is not None
    ]
    for what, found, origin in files:
        for text in split_places(found):
            yield _set(what, text, origin.command(text) if origin else "")


def _set(what: str, text: str, command: str) -> Needed:
    def files() -> list[tuple[str, int]]:
        (place,) = find_places(text)
        return [] if place is None else list(place.names)

    return _listed(what, text, files, command)


def _models(config: StudyConfig) -> Iterator[Needed]:
    of_grid = [(f"grid.models {label}", place, None) for label, place, _ in labeled_models(config.grid)]
    for what, place, origin in (("reward.model", config.reward.model, REWARD_MODEL), ("train.initial", config.train.initial, None), *of_grid):
        if place is not None:
            path = location(place)
            files = [(file.name, file.stat().st_size) for file in path.iterdir() if file.is_file()] if path.is_dir() else []
            yield _listed(what, place, lambda files=files: files, origin.command(place) if origin else "")
