"""Every check of a config and its message: first names and types, then whether the values fit together. None needs jax."""

import dataclasses
import difflib
import itertools
import math
import re
import types
import typing
from typing import Any

from plasticity_jax.config.checks_downstream import check_downstream
from plasticity_jax.config.rules import check_choice, check_fraction, check_pattern, check_positive, refuse_unless
from plasticity_jax.config.schema import Member, ModelConfig, StudyConfig, execution_fields, grid_members, member_config, result_fields
from plasticity_jax.errors import UserError


def unknown_key(prefix: str, name: str, node: Any) -> UserError:
    known = sorted(node) if isinstance(node, dict) else []
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known) or 'none'}."
    return UserError(f"config key {prefix}{name} is unknown; {hint}")


def build(cls: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, dict):
        raise UserError(f"{path.rstrip('.')}={tree!r} must be a section with keys {', '.join(f.name for f in dataclasses.fields(cls))}.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in tree:
        if name not in known:
            raise unknown_key(path and path.rstrip(".") + ".", name, known)
    prefix = path and path.rstrip(".") + "."
    return cls(**{name: _convert(hints[name], value, prefix + name) for name, value in tree.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path)
    if origin is types.UnionType:
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is tuple and isinstance(value, (tuple, list)):
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
        if len(args) == len(value):
            return tuple(_convert(a, v, f"{path}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    elif origin is dict and isinstance(value, dict):
        return {str(k): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is dict and isinstance(value, dict):
        return dict(value)
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    raise UserError(f"{path}={value!r} is {_article(type(value).__name__)}; it must be {_describe(hint)}.")


def _article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a tuple such as ({_describe(args[0])}, ...)"
        return "a tuple (" + ", ".join(_describe(a) for a in args) + ")"
    if origin is types.UnionType:
        return " or ".join("None" if a is type(None) else _describe(a) for a in args)
    return {int: "an int", float: "a float", bool: "True or False", str: "a string", dict: "a dict", Any: "any value"}.get(hint, str(hint))


_SWEPT_SECTIONS = ("model", "train", "decay", "data", "finetune")


def typed_grid(config: StudyConfig) -> StudyConfig:
    """The config with the values of `grid.fields` and `grid.changes` brought to the types of their fields, as `build` does for every other.

    Raises:
      UserError: a field that cannot differ between members, or a value of another type.
    """
    grid = config.grid
    fields = tuple(
        (name, tuple(_convert(_swept_type(config, "grid.fields", name), value, f"grid.fields: {name}[{i}]") for i, value in enumerate(values)))
        for name, values in grid.fields
    )
    changes = tuple(
        (pattern, {name: _convert(_swept_type(config, "grid.changes", name), value, f"grid.changes: {name}") for name, value in changed.items()})
        for pattern, changed in grid.changes
    )
    return dataclasses.replace(config, grid=dataclasses.replace(grid, fields=fields, changes=changes))


def _swept_type(config: StudyConfig, where: str, name: str) -> Any:
    """The type of a dotted field in which members may differ."""
    section, _, last = name.partition(".")
    if section not in _SWEPT_SECTIONS:
        known = {f"{s}.{key}": None for s in _SWEPT_SECTIONS for key in result_fields(getattr(config, s))}
        if not hasattr(config, section):
            raise unknown_key(f"{where}: ", name, known)
        raise UserError(
            f"{where} sets {name}, but members differ in their training alone and are examined alike; "
            f"set a field of {', '.join(_SWEPT_SECTIONS)}, or λ in grid.weight_decay."
        )
    settings = getattr(config, section)
    if name == "finetune.seeds":
        raise UserError(f"{where} sets finetune.seeds, which every member is fine-tuned with already; list the seeds in finetune.seeds alone.")
    if name in execution_fields(config):
        raise UserError(f"{where} sets {name}, which changes speed, cadence or place and not the result; set {name} once, for all members.")
    if last not in result_fields(settings):
        raise unknown_key(f"{where}: {section}.", last, result_fields(settings))
    return typing.get_type_hints(type(settings))[last]


def check_config(config: StudyConfig) -> None:
    """Refuses values that do not fit together. Raises UserError: one line with the value, the rule and the way out."""
    _check_name(config.name)
    _check_model(config.model)
    _check_train(config)
    _check_choices(config)
    check_downstream(config)
    _check_hardware(config)
    _check_launch(config)
    _check_grid(config)


def _check_name(name: str) -> None:
    refuse_unless(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None,
        f"name={name!r} becomes a folder: use letters, digits, dot, dash and underscore, beginning with a letter or digit.",
    )


def _check_model(model: ModelConfig) -> None:
    for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "rope_theta", "norm_eps"):
        check_positive(f"model.{name}", getattr(model, name))
    d, h, kv = model.d_model, model.n_heads, model.n_kv_heads
    if model.d_head is None:
        low, high = d // h * h, (d // h + 1) * h
        refuse_unless(
            d % h == 0,
            f"model.d_model={d} is not divisible by model.n_heads={h}; set d_model to {low or high} or {high}, change n_heads, or give model.d_head.",
        )
    else:
        check_positive("model.d_head", model.d_head)
    refuse_unless(h % kv == 0, f"model.n_heads={h} is not divisible by model.n_kv_heads={kv}; set n_kv_heads to a divisor of {h}.")
    refuse_unless(
        model.head_dim % 2 == 0,
        f"the head size {model.head_dim} is odd; rotary embedding needs an even one: change model.d_head, or d_model or n_heads.",
    )
    check_choice("model.norm_position", model.norm_position, ("pre", "post"))
    check_choice("model.init", model.init, ("scaled", "truncated"))
    if model.rope_scaling is not None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_length"):
            check_positive(f"model.rope_scaling.{name}", getattr(model.rope_scaling, name))
        low, high = model.rope_scaling.low_freq_factor, model.rope_scaling.high_freq_factor
        refuse_unless(low < high, f"model.rope_scaling.low_freq_factor={low} must be below high_freq_factor={high}.")


def check_trained_vocabulary(config: StudyConfig) -> None:
    """Of a config that will train its tokenizer; an imported model's config may have any vocabulary. Raises UserError."""
    refuse_unless(
        config.data.tokenizer != "train" or config.model.vocab_size >= 300,
        f"model.vocab_size={config.model.vocab_size} is below 300; a byte-level tokenizer needs 256 bytes and special tokens.",
    )


def _check_train(config: StudyConfig) -> None:
    train, data = config.train, config.data
    for name in (
        "batch_size",
        "seq_len",
        "steps",
        "peak_lr",
        "eps",
        "clip_norm",
        "max_loss",
        "held_out_tokens",
        "eval_tokens",
        "eval_every",
        "log_every",
        "checkpoint_every",
        "grad_accum_steps",
    ):
        check_positive(f"train.{name}", getattr(train, name))
    refuse_unless(
        train.batch_size % train.grad_accum_steps == 0,
        f"train.batch_size={train.batch_size} is not divisible by train.grad_accum_steps={train.grad_accum_steps}; set grad_accum_steps to a divisor of it.",
    )
    refuse_unless(
        train.loss_chunks == 0 or (train.loss_chunks > 0 and train.seq_len % train.loss_chunks == 0),
        f"train.seq_len={train.seq_len} is not divisible by train.loss_chunks={train.loss_chunks}; set loss_chunks to a divisor of it, or to 0.",
    )
    for name in ("warmup_fraction", "decay_fraction", "final_lr_fraction", "b1", "b2"):
        check_fraction(f"train.{name}", getattr(train, name))
    if train.schedule == "wsd":
        refuse_unless(
            train.warmup_fraction + train.decay_fraction <= 1,
            f"train.warmup_fraction={train.warmup_fraction} and train.decay_fraction={train.decay_fraction} together exceed the run; lower one of them.",
        )
    refuse_unless(
        math.isfinite(train.z_loss) and train.z_loss >= 0, f"train.z_loss={train.z_loss} must be finite and not negative; OLMo-2 uses 1e-5."
    )
    refuse_unless(train.b1 < 1 and train.b2 < 1, f"train.b1={train.b1} and train.b2={train.b2} must be below 1.")
    refuse_unless(0 < data.held_out_fraction < 1, f"data.held_out_fraction={data.held_out_fraction} must lie strictly between 0 and 1; 0.1 is usual.")
    _check_data(config)


def _check_data(config: StudyConfig) -> None:
    from plasticity_jax.data.named_tokenizers import check_setting

    data = config.data
    refuse_unless(
        data.files is None or data.tfds is None, f"data.files={data.files} and data.tfds={data.tfds}: set one of the two, the other to None."
    )
    streamed = data.files is not None or data.tfds is not None
    for name in ("files", "tfds", "tfds_split", "text_field", "tokenizer"):
        refuse_unless(getattr(data, name) != "", f"data.{name}='' is empty; give it a value or leave it out.")
    refuse_unless(streamed or len(data.sources) > 0, "data.sources=() is empty; name at least one source.")
    for name, value, ok, other in (
        ("max_documents", data.max_documents, not streamed, "max_tokens"),
        ("max_tokens", data.max_tokens, streamed, "max_documents"),
    ):
        if value is not None:
            check_positive(f"data.{name}", value)
            place = "data.sources" if name == "max_documents" else "data.files and data.tfds"
            refuse_unless(ok, f"data.{name}={value} is for {place}; set data.{other} in its place.")
    refuse_unless(data.workers >= 0, f"data.workers={data.workers} must not be negative; 0 takes one process per core.")
    check_setting(data.tokenizer, config.model.vocab_size)


def _check_launch(config: StudyConfig) -> None:
    launch = config.launch
    check_positive("launch.start_timeout", launch.start_timeout)
    refuse_unless(launch.compile_cache != "", "launch.compile_cache='' is empty; give a folder, or None to keep no compiled programs.")
    refuse_unless(0 < launch.mfu <= 1, f"launch.mfu={launch.mfu} is a share of the peak; it must be above 0 and at most 1.")
    if config.max_device_hours is not None:
        check_positive("max_device_hours", config.max_device_hours)


def _check_grid(config: StudyConfig) -> None:
    grid = config.grid
    refuse_unless(
        (grid.weight_decay is None) != (grid.timescales is None),
        f"grid.weight_decay={grid.weight_decay} and grid.timescales={grid.timescales}: set exactly one of the two, the other to None.",
    )
    for i, value in enumerate(grid.weight_decay or ()):
        refuse_unless(math.isfinite(value) and value >= 0, f"grid.weight_decay[{i}]={value} must be finite and not negative.")
    for i, value in enumerate(grid.timescales or ()):
        if value is not None:
            check_positive(f"grid.timescales[{i}]", value)
    points = grid.weight_decay if grid.weight_decay is not None else grid.timescales
    refuse_unless(len(points) > 0, "the grid is empty; give grid.weight_decay or grid.timescales at least one value.")
    refuse_unless(len(grid.seeds) > 0, "grid.seeds=() is empty; give at least one seed.")
    for i, seed in enumerate(grid.seeds):
        refuse_unless(seed >= 0, f"grid.seeds[{i}]={seed} must not be negative.")
    _check_swept(config)
    members = grid_members(config)
    names = [member.name for member in members]
    twice = sorted({name for name in names if names.count(name) > 1})
    refuse_unless(not twice, f"the grid names {', '.join(twice)} twice; values that agree in four digits, or equal seeds, are one member.")
    for pattern, _ in grid.changes:
        refuse_unless(
            any(re.search(pattern, name) for name in names),
            f"grid.changes: {pattern!r} matches no member; the members are {', '.join(names)}.",
        )
    for member in members:
        if member.changes:
            _check_alone(member_config(config, member), f"member {member.name}")


def _check_swept(config: StudyConfig) -> None:
    """Checks `grid.fields` and `grid.changes` by themselves, and every combination of the swept values as a config."""
    grid = config.grid
    typed_grid(config)
    swept = [name for name, _ in grid.fields]
    for name, values in grid.fields:
        refuse_unless(swept.count(name) == 1, f"grid.fields lists {name} twice; list its values together.")
        refuse_unless(len(values) > 0, f"grid.fields: {name} has no values; give it at least one, or leave it out.")
    for pattern, changed in grid.changes:
        check_pattern("grid.changes:", pattern, "^wd1$")
        for name in changed:
            refuse_unless(name not in swept, f"grid.changes: {pattern!r} sets {name}, which grid.fields sweeps; do one of the two.")
    for setting in (dict(grid.fields).get("train.compute_dtype", ()), *((c.get("train.compute_dtype"),) for _, c in grid.changes)):
        refuse_unless("auto" not in setting, "the grid sets train.compute_dtype to 'auto', which differs by machine; name float32 or bfloat16.")
    for values in itertools.product(*(values for _, values in grid.fields)) if grid.fields else ():
        overrides = tuple(zip(swept, values))
        _check_alone(
            member_config(config, Member("", "", 0.0, None, 0, overrides)),
            "the members with " + ", ".join(f"{name}={value}" for name, value in overrides),
        )


def _check_alone(own: StudyConfig, who: str) -> None:
    try:
        check_config(own)
    except UserError as error:
        raise UserError(f"for {who}: {error}") from error


def _check_choices(config: StudyConfig) -> None:
    from plasticity_jax.data.probe_sets import PROBE_SETS
    from plasticity_jax.data.sources import SOURCES
    from plasticity_jax.data.tasks import tasks

    check_choice("decay.kind", config.decay.kind, ("coupled", "independent"))
    check_choice("decay.mask", config.decay.mask, ("all", "olmo", "matrices-only"))
    check_choice("grid.mode", config.grid.mode, ("sequential", "vmapped"))
    check_choice("train.compute_dtype", config.train.compute_dtype, ("auto", "float32", "bfloat16"))
    check_choice("train.schedule", config.train.schedule, ("cosine", "wsd"))
    check_choice("train.remat", config.train.remat, ("none", "dots", "full"))
    check_choice("train.attention", config.train.attention, ("auto", "xla", "cudnn", "splash"))
    if config.data.files is None and config.data.tfds is None:
        for i, source in enumerate(config.data.sources):
            check_choice(f"data.sources[{i}]", source, tuple(SOURCES))
    for name in config.tasks:
        check_choice("tasks", name, tuple(tasks()))
    for i, name in enumerate(config.probe.sets):
        check_choice(f"probe.sets[{i}]", name, tuple(PROBE_SETS))


def _check_hardware(config: StudyConfig) -> None:
    known = execution_fields(config)
    for pattern, changes in config.hardware:
        check_pattern("hardware rule", pattern, "H100|A100")
        for key in changes:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(known))}."
                raise UserError(f"hardware rule {pattern!r} sets {key}, which is no execution field; {hint}")
    for name in ("member", "data", "fsdp", "tensor"):
        size = getattr(config.mesh, name)
        refuse_unless(size == -1 or size > 0, f"mesh.{name}={size} must be positive, or -1 to fill.")
