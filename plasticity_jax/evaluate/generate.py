"""Completions of many prompts, in batches of fixed shape. The host prepares and reads batches while the device decodes."""

import bisect
import collections
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int

from plasticity_jax.config import EvaluateConfig, ModelConfig
from plasticity_jax.data.batching import IN_FLIGHT, padded_batches
from plasticity_jax.errors import UserError
from plasticity_jax.evaluate.complete import (
    EOS_IDS,
    Batch,
    Memory,
    Plan,
    TracedSettings,
    complete,
    continue_decoding,
    count_programs,
    keep_rows,
    plan_of,
    start_decoding,
)
from plasticity_jax.evaluate.sampling import Sampling
from plasticity_jax.evaluate.stop_strings import cut_at_stop, stop_check
from plasticity_jax.model.cache import Layout
from plasticity_jax.model.forward import Forward
from plasticity_jax.model.param_count import count_params
from plasticity_jax.parallel import arrays, hardware
from plasticity_jax.parallel.batches import row_shards
from plasticity_jax.parallel.sharding import ROWS, inference_shardings, param_shardings
from plasticity_jax.progress import Progress

__all__ = ["Completion", "Sampling", "completions", "completions_of_members", "continue_text", "count_cut", "cut_at_stop", "generate", "stop_check"]

log = logging.getLogger("plasticity_jax")

SEGMENT = 64  # tokens between two checks on the host for completions that have ended
NARROWING = 4  # each smaller shape of a batch has about this many times fewer rows; see `shapes`
WORTH = 2 * SEGMENT  # tokens that a batch must have left to go on in a smaller shape, which may have to be compiled
WHOLE_SHARE = 0.25  # of a device's memory, up to which it holds all matrices; see `layout_for`
TAIL = 64  # tokens before a segment that are checked again with it; a stop string spans no more
_SPECS = (PartitionSpec(ROWS), PartitionSpec(ROWS), PartitionSpec(None, ROWS), PartitionSpec(ROWS), PartitionSpec(ROWS))  # of the fields of Batch

IsEnd = Callable[[list[int]], bool]


class Completion(NamedTuple):
    """What follows a prompt.

    Attributes:
      tokens: ids up to the token that ended the text, without the end-of-text token.
      ended: whether an end-of-text token or the text itself ended it, rather than the limit on tokens.
    """

    tokens: list[int]
    ended: bool


def completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    buckets: tuple[int, ...],
    batch_size: int,
    eos_id: int | Sequence[int],
    pad_id: int,
    compute_dtype: Any,
    what: str = "generate",
    layout: Layout = Layout(),
    skip: Collection[int] = (),
    is_end: IsEnd | None = None,
) -> Iterator[tuple[list[int], list[list[Completion]]]]:
    """Completes every prompt, greedily or by sampling, batch by batch.

    A completion's random stream depends on the seed, the prompt's tokens, the sample's number and the position in the completion. Where more than
    `SEGMENT` tokens may be generated, a batch whose rows have largely ended goes on in a smaller shape (`shapes`); when it does depends on its tokens
    only. So in float32 the same prompt gives the same tokens whatever else is in the call. In bfloat16 the shape decides how products are rounded, and
    the same list of prompts gives the same tokens, whatever `skip` leaves out.

    Args:
      model: a loaded model (with `.config` and `.params`), or the pair (config, params).
      prompts: token ids, at least one per prompt. A prompt longer than the last bucket, or than `max_length` less one token, loses its beginning
        (`count_cut` counts them).
      sampling: which completions each prompt gets.
      max_new_tokens: most tokens of a completion; None: as many as `max_length` leaves.
      max_length: most tokens of a prompt and its completion together; None: no limit but `max_new_tokens`. One of the two is needed.
      buckets: prompt lengths in tokens, ascending; a prompt is padded on the left to the first that holds it. One program is compiled per bucket.
      batch_size: sequences decoded at once; short batches are filled up.
      eos_id: ends a completion; or several, each of which does.
      pad_id: fills empty places; never read.
      compute_dtype: dtype of the matmuls and the cache.
      what: label of the progress display.
      layout: where the parameters lie (see `placed`); prompts are sharded over data and fsdp of its mesh. With several processes, all call this with
        the same arguments and get the same tokens.
      skip: indices of prompts to leave out, such as those completed by an earlier call.
      is_end: whether the tokens so far end the completion by their text (`stop_check`). It must stay true when tokens are added.
    Yields:
      Indices of the prompts in a batch, and for each its completions, the greedy one first.
    Raises:
      ValueError: an empty prompt or a number out of range.
    """
    config, params = model if isinstance(model, tuple) else (model.config, model.params)
    plan = functools.partial(plan_of, config, sampling, compute_dtype=compute_dtype, layout=layout)
    how = {"buckets": buckets, "batch_size": batch_size, "eos_id": eos_id, "pad_id": pad_id, "what": what, "skip": skip, "is_end": is_end}
    for indices, work in _batches(plan, params, prompts, sampling, 1, max_new_tokens=max_new_tokens, max_length=max_length, **how):
        yield indices, work.completions(())


def completions_of_members(
    config: ModelConfig,
    params: Any,
    members: int,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    compute_dtype: Any,
    layout: Layout = Layout(),
    **how: Any,
) -> Iterator[tuple[list[int], list[list[list[Completion]]]]]:
    """`completions` of several models of one network as one program; each gets those that it gets by itself, to rounding.

    A batch is decoded until every member's completions have ended.

    Args:
      params: with a leading member axis (see `stacked`).
      members: how many there are.
      how: the other arguments of `completions`; `batch_size` counts the sequences of one member.
    Yields:
      Indices of the prompts in a batch, and for each member what `completions` yields.
    """
    plan = functools.partial(plan_of, config, sampling, compute_dtype=compute_dtype, layout=layout, members=True)
    for indices, work in _batches(plan, params, prompts, sampling, members, **how):
        yield indices, [work.completions((member,)) for member in range(members)]


def _batches(
    plan_for: Callable[..., Plan],
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    members: int,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    buckets: tuple[int, ...],
    batch_size: int,
    eos_id: int | Sequence[int],
    pad_id: int,
    what: str = "generate",
    skip: Collection[int] = (),
    is_end: IsEnd | None = None,
) -> Iterator[tuple[list[int], "_Work"]]:
    """Batches of prompts, each once all its completions are complete. `plan_for` gives the plan for a number of new tokens."""
    _check(prompts, max_new_tokens, max_length, buckets, batch_size)
    longest = buckets[-1] if max_length is None else min(buckets[-1], max_length - 1)
    plans = {bucket: plan_for(slots) for bucket, slots in completion_slots(buckets, max_length, max_new_tokens).items()}
    mesh = plans[buckets[0]].layout.mesh
    traced = TracedSettings(
        np.float32(sampling.temperature),
        np.float32(sampling.top_p),
        np.float32(sampling.repetition_penalty),
        _eos_ids(eos_id),
        np.int32(pad_id),
    )
    rows = _prompts_per_batch(batch_size, sampling, mesh)
    left_out = frozenset(skip)
    waiting: collections.deque[_Work] = collections.deque()
    compiled = 0
    kept = [index for index in range(len(prompts)) if index not in left_out]
    each = sampling.n_completions * members
    initial = (len(prompts) - len(kept)) * each
    with Progress(what, total=len(prompts) * each, unit="completions", initial=initial, main=True) as progress:

        def finished() -> tuple[list[int], _Work]:
            """The next batch that is complete; the others continue meanwhile."""
            while True:
                work = waiting.popleft()
                if work.read():
                    progress.update(len(work.indices) * each)
                    return work.indices, work
                progress.update(0)
                before, start = count_programs(), time.monotonic()
                work.send_next_segment()
                if count_programs() > before:
                    log.info("compiled the program for the %d completions that a batch goes on with in %.1f s", work.rows, time.monotonic() - start)
                waiting.append(work)

        # Batches of all prompts, so that none has other company after a resume.
        ends = [prompt[-longest:] for prompt in prompts]
        for indices, tokens, lengths in padded_batches(ends, buckets=buckets, batch_size=rows, pad_id=pad_id, left=True):
            bucket, wanted = tokens.shape[1], [place for place, index in enumerate(indices) if index not in left_out]
            if not wanted:
                continue
            plan = plans[bucket]
            uniforms = _uniforms([prompts[index] for index in indices], rows, sampling, plan.max_new_tokens)
            limits = np.full(rows, plan.max_new_tokens) if max_length is None else np.minimum(plan.max_new_tokens, max_length - lengths)
            limits = np.repeat(np.where(lengths > 0, limits, 0), sampling.n_completions).astype(np.int32)
            greedy = np.arange(len(limits)) % sampling.n_completions < sampling.greedy
            batch = Batch(tokens, np.arange(bucket) >= bucket - lengths[:, None], uniforms, greedy, limits)
            if mesh is not None:
                batch = Batch(*(arrays.put(x, NamedSharding(mesh, spec)) for x, spec in zip(batch, _SPECS, strict=True)))
            before, start = count_programs(), time.monotonic()
            waiting.append(_Work(plan, params, batch, traced, [indices[place] for place in wanted], wanted, is_end, limits))
            if count_programs() > before:
                compiled += 1
                log.info(
                    "compiled the program for prompts of up to %d tokens (%d of %d buckets) in %.1f s",
                    bucket,
                    compiled,
                    len(buckets),
                    time.monotonic() - start,
                )
            if len(waiting) == IN_FLIGHT:
                yield finished()
        while waiting:
            yield finished()


def completion_slots(buckets: Sequence[int], max_length: int | None, max_new_tokens: int | None) -> dict[int, int]:
    """Bucket → tokens of the longest completion of a prompt that is padded to it; buckets that no prompt within `max_length` needs are left out.

    Args:
      buckets, max_length, max_new_tokens: as of `completions`.
    """
    shortest = [1, *(bucket + 1 for bucket in buckets[:-1])]  # prompt of a bucket
    slots = {}
    for bucket, prompt in zip(buckets, shortest, strict=True):
        room = [limit for limit in (max_new_tokens, None if max_length is None else max_length - prompt) if limit is not None]
        if min(room) > 0:
            slots[bucket] = min(room)
    return slots


def largest_shapes(settings: EvaluateConfig, max_new_tokens: int | None, rows_per_prompt: int) -> list[tuple[int, int]]:
    """(prompt, completion) in tokens of the programs of an evaluation that may take the most memory: the largest cache, and the longest prompt."""
    shapes = list(completion_slots(settings.paddings, settings.max_length, max_new_tokens).items())
    largest = max(shapes, key=lambda shape: shape[0] + rows_per_prompt * shape[1])
    return list(dict.fromkeys((largest, shapes[-1])))


def layout_for(weights: str, config: ModelConfig, forward: Forward) -> Layout:
    """Where decoding takes place.

    "auto" holds the matrices whole on every device (but for the tensor axis) if they take at most `WHOLE_SHARE` of its memory, because otherwise every
    token gathers them all; where the memory is not known, they stay sharded.

    Args:
      weights: as `evaluate.weights`.
    """
    mesh = forward.mesh
    if mesh is None or mesh.shape["fsdp"] == 1:
        return Layout(mesh, False, forward.scan_layers)
    sharded = weights == "sharded"
    if weights == "auto":
        held = jnp.dtype(forward.compute_dtype).itemsize * count_params(config) / mesh.shape["tensor"]
        known = hardware.of_kind(mesh.devices.flat[0].device_kind)
        sharded = known is None or held > WHOLE_SHARE * known.limit
        _say_once(
            f"evaluate.weights auto → {'sharded' if sharded else 'whole'}: the matrices take {held / 2**30:.2f} GiB per device"
            + ("; its memory is not known" if known is None else f" of {known.limit / 2**30:.2f}, and are whole up to {WHOLE_SHARE:.0%}")
        )
    return Layout(mesh, sharded, forward.scan_layers)


@functools.lru_cache(maxsize=64)
def _say_once(line: str) -> None:
    log.info("%s", line)


def placed(params: Any, layout: Layout) -> Any:
    """Parameters, as `load_model` places them, where decoding reads them."""
    return params if layout.mesh is None or layout.sharded else arrays.put(params, inference_shardings(layout.mesh, params))


def stacked(models: Sequence[Any], layout: Layout) -> Any:
    """The parameters of several models along a leading member axis, over the mesh's member axis, where decoding reads them."""
    if layout.mesh is None:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    return _stack(_member_shardings(layout, models[0]), len(models))(list(models))


def _member_shardings(layout: Layout, params: Any) -> tuple[Any, tuple[NamedSharding, ...]]:
    assert layout.mesh is not None
    of_one = (param_shardings if layout.sharded else inference_shardings)(layout.mesh, params)
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda s: NamedSharding(layout.mesh, PartitionSpec("member", *s.spec)), of_one))  # pyright: ignore[reportArgumentType]
    return tree, tuple(leaves)


@functools.lru_cache(maxsize=8)
def _stack(shardings: tuple[Any, tuple[NamedSharding, ...]], members: int) -> Callable[[list[Any]], Any]:
    tree, leaves = shardings
    return jax.jit(lambda models: jax.tree.map(lambda *of_members: jnp.stack(of_members), *models), out_shardings=tree.unflatten(leaves))


def lower_completions(
    config: ModelConfig, params: Any, settings: EvaluateConfig, shape: tuple[int, int], forward: Forward, *, members: int = 1
) -> Any:
    """The program of an evaluation for prompts and completions of one shape, lowered for the devices of the mesh of `forward`.

    Args:
      shape: tokens of prompt and completion.
      params: shapes and shardings, as of a loaded model; decoding reads them as `layout_for` says.
      members: models that are evaluated as one program.
    """
    mesh, layout = forward.mesh, layout_for(settings.weights, config, forward)
    assert mesh is not None
    sampling = Sampling.of(settings, settings.n_samples)
    prompts, (longest, max_new_tokens) = _prompts_per_batch(settings.batch_size, sampling, mesh), shape
    rows = prompts * sampling.n_completions
    shapes_of = [(prompts, longest), (prompts, longest), (max_new_tokens, rows), (rows,), (rows,)]
    dtypes = (jnp.int32, jnp.bool_, jnp.float32, jnp.bool_, jnp.int32)
    arrays_of = [jax.ShapeDtypeStruct(x, t, sharding=NamedSharding(mesh, s)) for x, t, s in zip(shapes_of, dtypes, _SPECS, strict=True)]
    batch = Batch(*arrays_of)  # pyright: ignore[reportArgumentType]
    number, ids = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((EOS_IDS,), jnp.int32)
    traced = TracedSettings(number, number, number, ids, jax.ShapeDtypeStruct((), jnp.int32))
    if not layout.sharded:
        params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, inference_shardings(mesh, params))
    if members > 1:
        tree, shardings = _member_shardings(layout, params)
        stacked_shapes = [
            jax.ShapeDtypeStruct((members, *x.shape), x.dtype, sharding=s) for x, s in zip(jax.tree.leaves(params), shardings, strict=True)
        ]
        params = tree.unflatten(stacked_shapes)
    plan = plan_of(config, sampling, max_new_tokens, forward.compute_dtype, layout, members=members > 1)
    return complete.lower(plan, params, batch, traced)


def _prompts_per_batch(batch_size: int, sampling: Sampling, mesh: Mesh | None) -> int:
    shards = 1 if mesh is None else row_shards(mesh)
    return max(1, batch_size // sampling.n_completions // shards) * shards


def generate(model: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[list[int]]]:
    """Tokens of all completions, by prompt and completion, the greedy one first. Takes the arguments of `completions`.

    Raises:
      ValueError: an empty prompt or a number out of range.
    """
    tokens: list[list[list[int]]] = [[] for _ in prompts]
    for indices, of_batch in completions(model, prompts, **settings):
        for index, of_prompt in zip(indices, of_batch, strict=True):
            tokens[index] = [completion.tokens for completion in of_prompt]
    return tokens


def continue_text(model: Any, prompt: str, *, max_new_tokens: int, temperature: float, seed: int, **options: Any) -> str:
    """Continues a text, without template or stop strings, in float32.

    Args:
      model: a LoadedModel.
      temperature: 0 decodes greedily.
      seed: of the random stream; the same seed gives the same text.
      options: top_k, top_p and repetition_penalty of `Sampling`.
    Raises:
      UserError: the model has no tokenizer, or the prompt no token.
    """
    if model.tokenizer is None:
        raise UserError(f"{model.path} has no tokenizer.json, so no text can be generated; put the model's tokenizer there.")
    tokens = model.tokenizer.encode(prompt)
    if not tokens:
        raise UserError("--prompt is empty; give at least one character to continue from.")
    tokens = [*model.tokenizer.prefix_ids, *tokens]
    _check_room(model.config, len(tokens), max_new_tokens)
    [[completion]] = generate(
        model,
        [tokens],
        sampling=Sampling(n_samples=1 if temperature > 0 else 0, temperature=temperature or 1.0, seed=seed, **options),
        max_new_tokens=max_new_tokens,
        buckets=(len(tokens),),
        batch_size=1,
        eos_id=model.tokenizer.eos_ids,
        pad_id=model.tokenizer.pad_id,
        compute_dtype=jnp.float32,
    )
    return model.tokenizer.decode(completion)


def _check_room(config: ModelConfig, prompt: int, new: int) -> None:
    """Refuses a text that takes far more memory than there is. Attention over the prompt holds a few matrices of all pairs of its tokens per head."""
    limit = hardware.memory_of(jax.devices()[0])
    needed = 4 * (4 * config.n_heads * prompt**2 + 2 * config.n_layers * config.n_kv_heads * config.head_dim * (prompt + new) + prompt * config.d_ff)
    if limit is not None and needed > limit:
        raise UserError(
            f"--prompt has {prompt:,} tokens, which with --max-new-tokens={new} take about {needed / 2**30:,.1f} GiB of memory, and there are "
            f"{limit / 2**30:,.1f}; give a shorter prompt, or ask for fewer tokens."
        )


def count_cut(prompts: Sequence[Sequence[int]], longest: int) -> int:
    """Number of prompts of more than `longest` tokens, which lose their beginning."""
    return sum(len(prompt) > longest for prompt in prompts)


# ------------------------------------------------------------------------------------------------------------------- a batch under way


class Shape(NamedTuple):
    """Of a batch under way: places, each with one prompt and some of its completions."""

    places: int
    completions: int


def shapes(prompts: int, completions: int, shards: int) -> list[Shape]:
    """Shapes in which a batch may go on, ascending in rows, the last of which is the whole. Each of them is a program.

    First there are fewer completions in a place, and a prompt with more of them takes several places, which finished ones have left; then fewer places.

    Args:
      prompts: places at first.
      completions: of each prompt.
      shards: number of shards of the rows, which have as many places each.
    """
    found = [Shape(prompts, completions)]
    while found[-1].places * found[-1].completions > NARROWING * shards:  # so few rows take as long as one
        places, each = found[-1]
        found.append(Shape(places, -(-each // NARROWING)) if each > 1 else Shape(-(-places // (NARROWING * shards)) * shards, 1))
    return found[::-1]


class _Work:
    """A batch on the device. It is decoded in one call, or, where more than `SEGMENT` tokens may be generated, in segments, between which the host ends
    the rows whose text has ended; if most rows have ended, the others go on in the smallest of `shapes` that holds them.

    Args:
      indices: of the prompts whose completions are wanted.
      wanted: their places in the batch.
      limits: tokens after which each row ends.
    """

    def __init__(
        self,
        plan: Plan,
        params: Any,
        batch: Batch,
        traced: TracedSettings,
        indices: list[int],
        wanted: list[int],
        is_end: IsEnd | None,
        limits: Int[np.ndarray, " b"],
    ):
        self.indices, self._wanted, self._limits = indices, wanted, limits
        self._plan, self._eos_ids, self._is_end = plan, frozenset(traced.eos_ids.tolist()), is_end
        self._params, self._batch, self._traced = params, batch, traced
        self._each, prompts = plan.n_samples + plan.greedy, batch.tokens_PxS.shape[0]
        self._shards = 1 if plan.layout.mesh is None else row_shards(plan.layout.mesh)
        self._shapes = shapes(prompts, self._each, self._shards)
        self._rows = np.arange(prompts * self._each)  # in the batch as it began, of the rows that are decoded; -1 where a place has none
        self._seen = 0  # tokens per row that the host has checked
        self._tokens: np.ndarray | None = None
        self._memory: Memory | None = None
        if plan.max_new_tokens <= SEGMENT:
            self._sent = plan.max_new_tokens
            self._decoded = complete(plan, params, batch, traced)
        else:
            self._sent = 0
            self._decoded, self._prompt, self._memory = start_decoding(plan, params, batch, traced)
            self.send_next_segment()

    @property
    def rows(self) -> int:
        """Number of rows that are decoded."""
        return len(self._rows)

    def send_next_segment(self) -> None:
        """Sends the next segment to the device."""
        self._sent = min(self._sent + SEGMENT, self._plan.max_new_tokens)
        assert self._memory is not None
        arguments = (self._plan, self._params, self._batch, self._traced)
        self._decoded, self._memory = continue_decoding(*arguments, self._decoded, self._prompt, self._memory, np.int32(self._sent))

    def read(self) -> bool:
        """Waits for the segments sent so far. Returns whether the batch is complete; if not, stops the rows whose text has ended."""
        tokens = np.swapaxes(arrays.to_host(self._decoded.out_NxB), -1, -2)  # [B, N], or [members, B, N]
        so_far = tokens.copy() if self._tokens is None else self._tokens
        so_far[..., self._rows[self._rows >= 0], :] = tokens[..., self._rows >= 0, :]
        self._tokens = so_far
        if self._sent == self._plan.max_new_tokens:
            return True
        ended = arrays.to_host(self._decoded.ended_B).copy()  # [B], or [members, B]
        for row in zip(*np.nonzero(~ended), strict=True) if self._is_end else ():
            text = tokens[row][: self._sent].tolist()
            # Checking the last tokens is cheap and almost always enough.
            ended[row] = self._text_ends(text[max(0, self._seen - TAIL) :]) and self._text_ends(text)
        self._seen = self._sent
        if np.all(ended):
            return True
        ended = self._go_on_with(ended)
        self._decoded = self._decoded._replace(ended_B=arrays.put(ended, self._decoded.ended_B.sharding))
        return False

    def _go_on_with(self, ended: np.ndarray) -> np.ndarray:
        """Leaves out ended rows, if the others fit into a smaller shape and it is worth while. Returns which of the rows that are left have ended."""
        going_B = np.any((~ended).reshape(-1, len(self._rows)), axis=0)
        if self._limits[self._rows[going_B]].max() - self._sent < WORTH:
            return ended
        for shape in self._shapes:
            if shape.places * shape.completions >= len(self._rows):
                return ended
            if (arranged := self._arranged(going_B, shape)) is not None:
                break
        else:
            raise AssertionError("the last shape holds all rows")
        places_HxP, rows_HxB = arranged
        left_B = (np.arange(self._shards)[:, None] * (len(self._rows) // self._shards) + rows_HxB).ravel()
        empty_B = (rows_HxB < 0).ravel()
        assert self._memory is not None
        self._batch, self._decoded, self._prompt, self._memory = keep_rows(
            self._plan, self._batch, self._decoded, self._prompt, self._memory, places_HxP, np.maximum(rows_HxB, 0)
        )
        self._rows = np.where(empty_B, -1, self._rows[left_B])
        return ended[..., left_B] | empty_B

    def _arranged(self, going_B: Bool[np.ndarray, " b"], shape: Shape) -> tuple[Int[np.ndarray, "h p"], Int[np.ndarray, "h k"]] | None:
        """Where the places and rows of a smaller shape come from (see `keep_rows`), -1 for a row that has nothing to do; None if they do not fit."""
        each_shard, places = len(self._rows) // self._shards, len(self._batch.tokens_PxS)
        places_HxP = np.zeros((self._shards, shape.places // self._shards), np.int32)
        rows_HxPxR = np.full((*places_HxP.shape, shape.completions), -1, np.int32)
        for shard in range(self._shards):
            of_shard = slice(shard * each_shard, (shard + 1) * each_shard)
            rows = np.flatnonzero(going_B[of_shard])
            prompt_of = self._rows[of_shard][rows] // self._each
            filled = 0
            for prompt in np.unique(prompt_of):
                of_prompt = rows[prompt_of == prompt]
                for first in range(0, len(of_prompt), shape.completions):
                    if filled == places_HxP.shape[1]:
                        return None
                    of_place = of_prompt[first : first + shape.completions]
                    places_HxP[shard, filled] = of_place[0] // (len(self._rows) // places)
                    rows_HxPxR[shard, filled, : len(of_place)] = of_place
                    filled += 1
        return places_HxP, rows_HxPxR.reshape(self._shards, -1)

    def _text_ends(self, tokens: list[int]) -> bool:
        return self._is_end is not None and self._is_end(tokens)

    def completions(self, member: tuple[()] | tuple[int]) -> list[list[Completion]]:
        """The completions of each wanted prompt, once `read` has returned True: of the one model, or of a member."""
        assert self._tokens is not None
        tokens_PxRxN = self._tokens[member][:, : self._sent].reshape(-1, self._each, self._sent)
        limits_PxR = self._limits.reshape(-1, self._each)
        return [
            [self._completion(tokens[:limit]) for tokens, limit in zip(tokens_PxRxN[place].tolist(), limits_PxR[place])] for place in self._wanted
        ]

    def _completion(self, tokens: list[int]) -> Completion:
        end = next((place for place, token in enumerate(tokens) if token in self._eos_ids), None)
        tokens, ended = tokens[:end], end is not None
        if self._text_ends(tokens):
            # The fewest tokens that end the text; how many more were decoded depends on where segments end.
            shortest = bisect.bisect_left(range(len(tokens)), True, lo=1, key=lambda n: self._text_ends(tokens[:n]))
            return Completion(tokens[:shortest], True)
        return Completion(tokens, ended)


# -------------------------------------------------------------------------------------------------------------------------- on the host


def _uniforms(prompts: list[Sequence[int]], rows: int, sampling: Sampling, max_new_tokens: int) -> np.ndarray:
    """[N, B] in [0, 1), float32. The n-th value of a sample's stream depends on seed, prompt, sample and n only.

    Raw Philox words, whose sequence NumPy guarantees. Drawn on the host, because drawing on the device takes seconds to compile.
    """
    uniforms = np.zeros((rows, sampling.n_completions, max_new_tokens), np.float32)
    for row, prompt in enumerate(prompts):
        prefix = hashlib.sha256(np.asarray([sampling.seed, *prompt], "<i8").tobytes())
        for sample in range(sampling.n_samples):
            digest = prefix.copy()
            digest.update(sample.to_bytes(8, "little"))
            words = np.random.Philox(key=int.from_bytes(digest.digest()[:16], "little")).random_raw(max_new_tokens)
            uniforms[row, sampling.greedy + sample] = (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return uniforms.reshape(-1, max_new_tokens).T


def _eos_ids(eos_id: int | Sequence[int]) -> np.ndarray:
    ids = [eos_id] if isinstance(eos_id, int | np.integer) else list(eos_id)
    return np.array([*ids, *[-1] * (-len(ids) % EOS_IDS)], np.int32)


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int | None, max_length: int | None, buckets: tuple[int, ...], batch_size: int) -> None:
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty; a prompt needs at least one token.")
    if max_new_tokens is None and max_length is None:
        raise ValueError("max_new_tokens and max_length are both None; set one of them, so that a completion has an end.")
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("max_length", max_length, 2), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} is below {least}; set it to {least} or more.")
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError(f"buckets={buckets} must be prompt lengths in ascending order, such as (32, 64).")
