"""Does a config fit on a machine, and how long does the grid take there? Compiles the real train step, also for devices that are not present."""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from plasticity_jax.config import StudyConfig, for_device, grid_members, member_config
from plasticity_jax.errors import UserError
from plasticity_jax.model.flops import flops_per_token
from plasticity_jax.model.kernels import choose_kernel
from plasticity_jax.model.transformer import abstract_params
from plasticity_jax.parallel import hardware, preemption
from plasticity_jax.parallel.batches import padded_batch_size, part_counts
from plasticity_jax.parallel.collectives import collective_bytes, largest_arrays
from plasticity_jax.parallel.deviceless import Target
from plasticity_jax.parallel.mesh import check_members, make_mesh
from plasticity_jax.parallel.sharding import param_shardings
from plasticity_jax.text import three_digits
from plasticity_jax.train.pretrain import step_settings
from plasticity_jax.train.step import lower_train_step, next_token_batch, state_bytes

log = logging.getLogger("plasticity_jax")

# `search` leaves the rest free: for fragmentation, which the peak does not count (3% on TPUs), for batches that are on their way to the device, and for
# other versions of the compiler.
SEARCH_FRACTION = 0.85
LARGEST = 5  # buffers to list when a config does not fit
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A compiled program; bytes are per device.

    Attributes:
      total: peak memory of the program.
      limit: memory available to a program.
      largest: (bytes, description) of the largest buffers.
      collectives: kind → bytes per call, such as a training step; empty if the compilation failed.
      compile_seconds: lowering and compilation.
    """

    fits: bool
    total: int
    limit: int
    largest: list[tuple[int, str]]
    collectives: dict[str, int]
    compile_seconds: float


@dataclass(frozen=True, kw_only=True)
class Answer(Measured):
    """The training step of a config, compiled.

    Attributes:
      members: models that it trains.
      params, optimizer: bytes of the state's shards.
    """

    config: StudyConfig
    members: int
    params: int
    optimizer: int

    @property
    def temporary(self) -> int:
        """Bytes of everything else: activations, gradients, batches."""
        return max(self.total - self.params - self.optimizer, 0)


def grid_flops(config: StudyConfig) -> float:
    """Model FLOPs of pretraining every base model of the grid; members that differ in their fine-tuning share one."""
    bases = {member.base: member_config(config, member) for member in grid_members(config)}
    return sum(map(pretraining_flops, bases.values()))


def pretraining_flops(config: StudyConfig) -> float:
    """Model FLOPs of pretraining one member with its own config."""
    train = config.train
    return float(flops_per_token(config.model, train.seq_len)) * train.steps * train.batch_size * train.seq_len


def grid_device_hours(config: StudyConfig, peak_flops: float) -> float:
    """Device-hours of pretraining the grid at `launch.mfu` of each device's peak."""
    return grid_flops(config) / (config.launch.mfu * peak_flops) / 3600


def refuse_over_budget(config: StudyConfig) -> None:
    """Checks that pretraining the grid on the visible devices takes at most `max_device_hours`.

    Raises:
      UserError: it would take longer.
    """
    if config.max_device_hours is None:
        return
    device = jax.devices()[0]
    known = hardware.of_kind(device.device_kind) or hardware.measured(device.device_kind, jax.local_device_count())
    hours = grid_device_hours(config, known.peak_flops)
    if hours > config.max_device_hours:
        raise UserError(
            f"max_device_hours={config.max_device_hours:g}: the grid's pretraining is estimated at {three_digits(hours)} device-hours on {device.device_kind} "
            f"(launch.mfu={config.launch.mfu:g}) and must stay within it; raise max_device_hours, or shorten the grid or train.steps."
        )


def lower_step(config: StudyConfig, mesh: Mesh, members: int) -> Any:
    """The training step of one model, or of `members` models as one program, lowered for the mesh's devices. Raises UserError for a mesh that does not fit."""
    train = config.train
    check_members(mesh, members)
    rows = padded_batch_size(mesh, train.batch_size, train.grad_accum_steps, "train")
    return lower_train_step(step_settings(config, mesh), mesh, next_token_batch(rows, train.seq_len), members=members)


def check(config: StudyConfig, target: Target, members: int = 1) -> Answer:
    """Compiles the train step of a config for a target, once.

    Args:
      config: as loaded; the hardware rules of the target's devices are applied here.
      members: models that are trained as one program.
    Raises:
      UserError: the mesh does not match the number of devices.
    """
    return _compile(resolved(config, target), target, members)


def search(config: StudyConfig, target: Target, members: int = 1) -> Answer:
    """Finds the fewest parts that fit in `SEARCH_FRACTION` of the memory with remat "dots", then drops remat if that fits too.

    "dots" recomputes attention and elementwise operations, a few percent of the FLOPs. More parts would cost more than that, because each gathers all
    weights and reduces all gradients; "full", which computes the forward pass twice, is used only if one row per device does not fit with "dots".

    Returns:
      The answer for these settings or, if none fits so, for the most parts with full remat. Compiles once for every halving of the choices.
    """
    config = resolved(config, target)
    mesh = make_mesh(config.mesh, target.devices)
    parts = part_counts(mesh, config.train.batch_size)

    @functools.cache
    def answer(grad_accum_steps: int, remat: str) -> Answer:
        return _compile(_with(config, grad_accum_steps=grad_accum_steps, remat=remat), target, members)

    def fits(found: Answer) -> bool:
        return found.fits and found.total <= SEARCH_FRACTION * found.limit

    def fewest(remat: str) -> Answer:
        first = bisect.bisect_left(parts, True, key=lambda n: fits(answer(n, remat)))
        return answer(parts[min(first, len(parts) - 1)], remat)

    best = fewest("dots")
    if not fits(best):
        return fewest("full")
    lighter = answer(best.config.train.grad_accum_steps, "none")
    return lighter if fits(lighter) else best


def to_record(answer: Answer, target: Target) -> dict[str, Any]:
    """What `plasticity check --json` prints."""
    train = answer.config.train
    return {
        "topology": target.topology,
        "devices": len(target.devices),
        "fits": answer.fits,
        "bytes": {name: getattr(answer, name) for name in ("params", "optimizer", "temporary", "total", "limit")},
        "members": answer.members,
        "microbatch": train.batch_size // train.grad_accum_steps,
        "remat": train.remat,
        "flops_per_token": flops_per_token(answer.config.model, train.seq_len),
        "collectives": answer.collectives,
        "compile_seconds": round(answer.compile_seconds, 1),
        "device_hours": grid_device_hours(answer.config, target.hardware.peak_flops),
    }


def lines(answer: Answer, target: Target) -> list[str]:
    """The answer as text."""
    config, train, known = answer.config, answer.config.train, target.hardware
    mesh = make_mesh(config.mesh, target.devices).shape
    free, share = answer.limit - answer.total, answer.total / answer.limit
    flops = flops_per_token(config.model, train.seq_len)
    hours, everything = grid_device_hours(config, known.peak_flops), len(target.devices) * (config.launch.parallel_runs or 1)
    speed = config.launch.mfu * known.peak_flops * len(target.devices) / flops
    text = [
        f"{target.topology}: {len(target.devices)} x {known.kind}, mesh " + ", ".join(f"{axis} {size}" for axis, size in mesh.items()),
        f"batch {train.batch_size} x {train.seq_len} in {train.grad_accum_steps} parts of {train.batch_size // train.grad_accum_steps}, remat {train.remat}"
        + (f", {answer.members} members as one program" if answer.members > 1 else ""),
        f"{'fits' if answer.fits else 'does not fit'}: {gib(answer.total)} of {gib(answer.limit)} per device ({share:.0%})",
        f"per device: parameters {gib(answer.params)}, optimizer {gib(answer.optimizer)}, activations and other temporaries {gib(answer.temporary)}, "
        f"free {gib(free)}",
        f"model FLOPs per token: {flops:,} (6 N + 12 L H Dh T)",
        "collectives per device and step: " + (", ".join(f"{kind} {gib(size)}" for kind, size in answer.collectives.items()) or "none"),
        f"compiled in {answer.compile_seconds:.0f} s",
        f"at {config.launch.mfu:.0%} MFU: {speed:,.0f} tokens/s; the grid's pretraining {three_digits(hours / everything)} hours, {three_digits(hours)} device-hours",
    ]
    if not answer.fits:
        text += ["the largest buffers:"] + [f"  {gib(size)}  {what}" for size, what in answer.largest]
    return text


def refused_bytes(message: str) -> int:
    """Bytes that the program would need, arguments and outputs included, from a TPU compiler's RESOURCE_EXHAUSTED message; 0 if it names none."""
    found = re.search(r"temporaries \(([\d.]+)([BKMGT]?)\)", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def program_bytes(memory: Any, platform: str) -> int:
    """Bytes that a program needs on each device: arguments, temporaries and outputs, without what is donated.

    On TPUs it is the peak of the compiler's buffers, because libtpu 0.0.42 counts what a loop stacks twice among the temporaries (0.0.52 does not). On
    CPUs the peak leaves the temporaries out.

    Args:
      memory: `compiled.memory_analysis()`.
    """
    if platform == "tpu":
        return memory.peak_memory_in_bytes
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def largest_values(program: str, number: int) -> list[tuple[int, str]]:
    """The largest distinct shapes in a program before partitioning: (bytes over all devices, "type[shape] over all devices").

    They stand in for buffers, which the TPU compiler's error message does not name.

    Args:
      program: StableHLO, `lowered.as_text()`.
    """
    sizes = {}
    for dims, kind in dict.fromkeys(re.findall(r"tensor<((?:\d+x)+)([a-z]+\d+)>", program)):
        shape = [int(size) for size in dims.split("x") if size]
        sizes[f"{kind}[{','.join(map(str, shape))}] over all devices"] = math.prod(shape) * int(re.sub(r"\D", "", kind)) // 8
    return [(size, text) for text, size in sorted(sizes.items(), key=lambda item: -item[1])[:number]]


def resolved(config: StudyConfig, target: Target) -> StudyConfig:
    """The config on a target's devices: with its hardware rules, and the compute dtype chosen."""
    config = for_device(config, target.devices[0].device_kind)
    if config.train.compute_dtype == "auto":
        config = _with(config, compute_dtype="float32" if target.devices[0].platform == "cpu" else "bfloat16")
    return config


def _with(config: StudyConfig, **train: Any) -> StudyConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def _compile(config: StudyConfig, target: Target, members: int) -> Answer:
    train, mesh = config.train, make_mesh(config.mesh, target.devices)
    held = state_bytes(step_settings(config, mesh), mesh, members=members)
    what = f"compile for {target.topology}, {train.grad_accum_steps} parts, remat {train.remat}"
    found = measure(lambda: lower_step(config, mesh, members), target, what, at_least=sum(held.values()))
    return Answer(config=config, members=members, **held, **vars(found))


def measure(lower: Callable[[], Any], target: Target, what: str, *, at_least: int = 0, known: dict[str, Measured] | None = None) -> Measured:
    """Compiles a program for a target, once.

    Args:
      lower: lowers it, for the target's devices.
      what: label of the progress display.
      at_least: bytes of the arguments, where the compiler refuses and names no size.
      known: digest of a lowered program → what compiling it gave; an equal one is not compiled again.
    """
    limit, start = target.hardware.limit, time.monotonic()
    refusal, digest, lowered, compiled = "", "", None, None
    with _ticking(what):
        try:
            lowered = lower()
            digest = "" if known is None else hashlib.sha256(lowered.as_text().encode()).hexdigest()
            if known and digest in known:
                return known[digest]
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if lowered is None or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            refusal = str(error)
    seconds = time.monotonic() - start
    if compiled is None:
        total = max(refused_bytes(refusal), at_least)
        largest, collectives = largest_values(lowered.as_text(), LARGEST), {}
    else:
        hlo = compiled.as_text()
        total = program_bytes(compiled.memory_analysis(), target.devices[0].platform)
        largest, collectives = largest_arrays(hlo, LARGEST), collective_bytes(hlo)
    fits = compiled is not None and total <= limit
    found = Measured(fits=fits, total=total, limit=limit, largest=largest, collectives=collectives, compile_seconds=seconds)
    if known is not None:
        known[digest] = found
    return found


@contextlib.contextmanager
def _ticking(what: str) -> Iterator[None]:
    """Logs every ten seconds that a silent call is still running."""
    done, start = threading.Event(), time.monotonic()
    log.info("%s: begun", what)

    def tick() -> None:
        while not done.wait(10.0):
            log.info("%s: %.0f s so far", what, time.monotonic() - start)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        with preemption.ends_at_once():
            yield
    finally:
        done.set()
        thread.join()


def gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if abs(size) >= 2**27 else f"{size / 2**20:,.2f} MiB"


def check_devices(config: StudyConfig) -> None:
    """Refuses, for every member of the grid, what the devices of this machine do not take: meshes, gradient accumulation steps, attention kernels.

    Raises:
      UserError: such as a mesh axis that does not divide a parameter.
    """
    device = jax.devices()[0]
    for own in (for_device(member_config(config, member), device.device_kind) for member in grid_members(config)):
        mesh = make_mesh(own.mesh)
        param_shardings(mesh, abstract_params(own.model))
        padded_batch_size(mesh, own.train.batch_size, own.train.grad_accum_steps, "train")
        if own.tasks:
            padded_batch_size(mesh, own.finetune.batch_size, own.finetune.grad_accum_steps, "finetune")
        choose_kernel(
            own.train.attention,
            platform=device.platform,
            head_dim=own.model.head_dim,
            compute_dtype=own.train.compute_dtype,
            seq_len=own.train.seq_len,
        )
