"""What a study reads from disk: what is there, what is missing, and the command that brings it."""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from plasticity_jax.config import StudyConfig
from plasticity_jax.data.corpus_files import Survey, survey
from plasticity_jax.data.named_tokenizers import NAMED, TRAINED
from plasticity_jax.data.tasks.originals import TFDS, find_places, split_places
from plasticity_jax.data.token_files import find_token_files, listed
from plasticity_jax.data.wheels import Wheels, wheels_dir
from plasticity_jax.errors import UserError
from plasticity_jax.runs.storage import location
from plasticity_jax.stages.stage import Plan


@dataclass(frozen=True)
class Published:
    """Where a set is published.

    Attributes:
      repo: on the Hugging Face Hub; a GitHub address for others.
      include: glob of the files to take; "" for all.
      model: whether the repo is a model's.
      revision: branch or tag; "" for the newest, whose commit the download should be noted with.
    """

    repo: str
    include: str = ""
    model: bool = False
    revision: str = ""

    def command(self, place: str) -> str:
        """The command that brings it, so that `place` in the config holds it. What lies in folders of the repo lies in the same folders below."""
        if "://" in self.repo:
            return f"see {self.repo}"
        words = ["hf", "download", self.repo, *([] if self.model else ["--repo-type", "dataset"])]
        words += ["--revision", self.revision] if self.revision else []
        words += ["--include", self.include] if self.include else []
        return shlex.join([*words, "--local-dir", place])


# What holds it → where it is published. Names from the paper's facts and the authors' scripts (docs/data.md says which are not certain).
PUBLISHED = {
    "data.files fineweb-edu": Published("HuggingFaceFW/fineweb-edu", "sample/350BT/*"),
    "data.files olmo-mix-1124": Published("allenai/olmo-mix-1124"),
    "reward.model": Published("Skywork/Skywork-Reward-Llama-3.1-8B-v0.2", model=True),
    "zero_shot.files mathqa": Published("regisss/math_qa", "*test*"),
    "MetaMathQA train": Published("meta-math/MetaMathQA"),
    "MetaMathQA gsm8k-platinum": Published("madrylab/gsm8k-platinum"),
    "MetaMathQA math": Published("EleutherAI/hendrycks_math", "*/test*"),
    "MedMCQA train": Published("HPAI-BSC/medmcqa-cot-llama31"),
    "MedMCQA validation": Published("openlifescienceai/medmcqa", "*validation*"),
    "PubMedQA pqa_artificial": Published("qiaojin/PubMedQA", "pqa_artificial/*"),
    "PubMedQA pqa_labeled": Published("qiaojin/PubMedQA", "pqa_labeled/*"),
    "MMLUProCoT test": Published("dongboklee/MMLU-Pro-Llama-3.1-70B-Instruct-CoT", "*test*"),
    "MMLUProCoT validation": Published("dongboklee/MMLU-Pro-Llama-3.1-70B-Instruct-CoT", "*validation*"),
    "RACE train": Published("ehovy/race", "all/train*"),
    "RACE validation": Published("ehovy/race", "all/validation*"),
    "RACE test": Published("ehovy/race", "all/test*"),
    "SimpleScaling train": Published("simplescaling/data_ablation_full59K"),
    "SimpleScaling gsm8k-platinum": Published("madrylab/gsm8k-platinum"),
    "SimpleScaling math": Published("EleutherAI/hendrycks_math", "*/test*"),
    "Safety instructions": Published("tatsu-lab/alpaca"),
    "Safety safety": Published("https://github.com/vinid/safety-tuned-llamas (data/training/safety_only_data_Instructions.json)"),
    "Safety test": Published("walledai/XSTest"),
    "CRUXEval test": Published("cruxeval-org/cruxeval"),
    "BoardgameQA test": Published("tasksource/Boardgame-QA", "*test*"),
    "TabMWP test": Published("https://github.com/lupantech/PromptPG (data/tabmwp/problems_test1k.json; one object per line)"),
    "StrategyQA test": Published("https://allenai.org/data/strategyqa (strategyqa_train.json)"),
}


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
        key = next((key for key in PUBLISHED if key.startswith("data.files ") and key.split()[1] in place), "")
        root = place.split("/sample/")[0]  # the repo's own folders lie below
        command = PUBLISHED[key].command(root) if key else ""
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
    files = [(f"{name} {key}", places) for name, task in config.tasks.items() for key, places in task.files.items()]
    files += [(f"zero_shot.files {name}", places) for name, places in config.zero_shot.files.items()]
    files += [
        (f"probe.files {name} {key}", place) for name, each in config.probe.files.items() for key, place in each.items() if key in ("train", "test")
    ]
    for what, places in files:
        for text in split_places(places):
            yield _set(what, text, PUBLISHED[what].command(text) if what in PUBLISHED else "")


def _set(what: str, text: str, command: str) -> Needed:
    def files() -> list[tuple[str, int]]:
        (place,) = find_places(text)
        return [] if place is None else list(place.names)

    return _listed(what, text, files, command)


def _models(config: StudyConfig) -> Iterator[Needed]:
    for what, place in (("reward.model", config.reward.model), ("train.initial", config.train.initial)):
        if place is not None:
            path = location(place)
            files = [(file.name, file.stat().st_size) for file in path.iterdir() if file.is_file()] if path.is_dir() else []
            yield _listed(what, place, lambda files=files: files, PUBLISHED[what].command(place) if what in PUBLISHED else "")
