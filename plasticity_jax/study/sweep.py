"""What a study sweeps: the field on the axis, the fields that cut it into slices, and how their values are written."""

from dataclasses import dataclass
from typing import Any

from plasticity_jax.config import Member, StudyConfig, grid_members
from plasticity_jax.config.grid import labeled_models

DECAY, PEAK_LR = "weight_decay", "train.peak_lr"
_NAMES = {
    DECAY: ("weight decay", "λ"),
    PEAK_LR: ("peak learning rate", "peak lr"),
    "finetune.peak_lr": ("fine-tuning peak learning rate", "SFT lr"),
    "finetune.batch_size": ("fine-tuning batch size", "SFT batch"),
    "finetune.weight_decay": ("fine-tuning weight decay", "SFT λ"),
    "finetune.select": ("fine-tuning", "SFT"),
}
_LABELS = "models."  # the field of the labels of `grid.models` begins with it
_LOG_FROM = 3.0  # largest over smallest positive value of a field that is drawn on a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """A swept field.

    Attributes:
      field: "weight_decay", a dotted config field, or `models.<grid.axis>` for the labels of models that exist.
      scale: "log" (with 0 set apart), "linear", or "categories", whose order is the config's.
    """

    field: str
    scale: str

    @property
    def name(self) -> str:
        """In sentences: "weight decay", "peak learning rate", "model.d_model"."""
        return _NAMES[self.field][0] if self.field in _NAMES else self.field.removeprefix(_LABELS)

    @property
    def title(self) -> str:
        """At the beginning of a title."""
        return self.name[0].upper() + self.name[1:] if self.field in _NAMES or self.field.startswith(_LABELS) else self.name

    @property
    def symbol(self) -> str:
        """In figures and tables: "λ", "peak lr", "d_model"."""
        return _NAMES[self.field][1] if self.field in _NAMES else self.field.rpartition(".")[2]

    @property
    def label(self) -> str:
        """Of the axis."""
        named = f"{self.name} {self.symbol}" if self.field == DECAY else self.name
        return named + (" (log)" if self.scale == "log" else "")

    @property
    def first(self) -> str:
        """What to call the first of the values."""
        return "first" if self.scale == "categories" else "smallest"

    @property
    def of_tuning(self) -> bool:
        """Whether it is a field of the fine-tuning: base models do not differ in it."""
        return self.field.startswith("finetune.")

    def value(self, member: Member) -> Any:
        return member.values[self.field]

    def text(self, value: Any) -> str:
        """A value in three digits; whole numbers in all of theirs."""
        if isinstance(value, float):
            return f"{value:.3g}"
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    def equation(self, value: Any) -> str:
        """The value with its symbol, such as "λ = 0.1"."""
        return f"{self.symbol} = {self.text(value)}"


# Cuts out of a study what `finetune.select` chose, as if it were swept beside the settings.
SELECTED = Axis("finetune.select", "categories")


def study_axis(config: StudyConfig) -> Axis:
    """The field that a study compares along: the labels of models that exist, or weight decay, where there is more than one; otherwise the first field
    with more than one value."""
    several = [name for name, values in config.grid.fields if len(values) > 1]
    if config.grid.models:
        labels = DECAY if config.grid.of_decay else f"{_LABELS}{config.grid.axis}"
        alone = len({label for label, _, _ in labeled_models(config.grid)}) == 1
        return _axis(config, several[0] if alone and several else labels)
    decays = config.grid.weight_decay if config.grid.timescales is None else config.grid.timescales
    return Axis(DECAY, "log") if len(decays or ()) > 1 or not several else _axis(config, several[0])


def facet_axes(config: StudyConfig) -> tuple[Axis, ...]:
    """The other fields with more than one value: each combination of theirs is a slice of the study."""
    along = study_axis(config).field
    return tuple(_axis(config, name) for name, values in config.grid.fields if len(values) > 1 and name != along)


def swept_values(member: Member) -> dict[str, Any]:
    """Columns that say which member a row is about: λ, its label, and every swept field."""
    return member.values


def _axis(config: StudyConfig, field: str) -> Axis:
    if field == DECAY:
        return Axis(DECAY, "log")
    values = [member.values[field] for member in grid_members(config)]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return Axis(field, "categories")
    positive = [value for value in values if value > 0]
    wide = positive and min(values) >= 0 and max(positive) >= _LOG_FROM * min(positive)
    return Axis(field, "log" if wide else "linear")
