"""Completions of one batch on the device: prompts are read once each, then all their completions are decoded together until all have ended."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from plasticity_jax.config import ModelConfig
from plasticity_jax.evaluate.sampling import Sampling, draw, keep_top_k, keep_top_p, penalize, tokens_seen
from plasticity_jax.model.cache import Layout, PromptCache, RowCache, decode, read_prompts

EOS_IDS = 8  # Llama 3.1 has three. A program serves all sets of up to this many


class Plan(NamedTuple):
    """Static settings of a compiled program, besides shapes. What is switched off is left out of the program."""

    config: ModelConfig
    max_new_tokens: int
    n_samples: int
    greedy: bool  # the first completion of each prompt is greedy
    top_k: int  # 0: off
    top_p: bool
    penalty: bool
    compute_dtype: Any
    layout: Layout
    members: bool  # parameters and results of several models, along a leading member axis; the prompts are shared


class TracedSettings(NamedTuple):
    """Settings that are traced: one compiled program serves all their values."""

    temperature: Any
    top_p: Any
    repetition_penalty: Any
    eos_ids: Any  # int32 [a multiple of EOS_IDS]; -1, which is no token, fills it up
    pad_id: Any


class Batch(NamedTuple):
    """P places, each with a prompt padded on the left to S tokens and R of its completions (B = P·R rows) of up to N tokens.

    Attributes:
      valid_PxS: False on padding.
      uniform_NxB: uniform random numbers, one per token to draw.
      greedy_B: rows that take the likeliest token.
      limit_B: tokens after which a row ends, at most N; 0 for the rows of an empty place.
    """

    tokens_PxS: Int[Array | np.ndarray, "p s"]
    valid_PxS: Bool[Array | np.ndarray, "p s"]
    uniform_NxB: Float[Array | np.ndarray, "n b"]
    greedy_B: Bool[Array | np.ndarray, " b"]
    limit_B: Int[Array | np.ndarray, " b"]


class Decoded(NamedTuple):
    """Tokens decoded so far.

    Attributes:
      step: number of tokens per row, including `pad_id` after an end-of-text token.
      token_B: the last token of each row.
    """

    step: Int[Array, ""]
    token_B: Int[Array, " b"]
    ended_B: Bool[Array, " b"]
    out_NxB: Int[Array, "n b"]


class Memory(NamedTuple):
    """State of the rows: their cache and, with a repetition penalty, which tokens are in the prompt or the completion."""

    rows: RowCache
    seen_BxV: Bool[Array, "b v"] | None


def plan_of(
    config: ModelConfig, sampling: Sampling, max_new_tokens: int, compute_dtype: Any, layout: Layout = Layout(), *, members: bool = False
) -> Plan:
    """The plan of a call. Settings that change nothing are switched off, so that they cost nothing."""
    samples = sampling.n_samples > 0
    return Plan(
        config,
        max_new_tokens,
        sampling.n_samples,
        sampling.greedy,
        top_k=sampling.top_k if samples and sampling.top_k < config.vocab_size else 0,
        top_p=samples and sampling.top_p < 1,
        penalty=sampling.repetition_penalty != 1,
        compute_dtype=jnp.dtype(compute_dtype),
        layout=layout,
        members=members,
    )


@functools.partial(jax.jit, static_argnums=0)
def complete(plan: Plan, params: Any, batch: Batch, traced: TracedSettings) -> Decoded:
    """Decodes a whole batch. The parameters are an argument, so one compiled program serves every model of the same shape."""
    decoded, prompt, memory = _read(plan, params, batch, traced)
    return _decode(plan, params, batch, traced, decoded, prompt, memory, plan.max_new_tokens)[0]


_OF_MEMBERS = Decoded(None, 0, 0, 0)  # pyright: ignore[reportArgumentType]  # the fields that have a member axis: all but the step, which they share


def _each_member(plan: Plan, function: Callable, in_axes: tuple, out_axes: Any) -> Callable:
    """The function, mapped over the members where there are several."""
    if not plan.members:
        return function
    across = "member" if plan.layout.mesh is not None else None
    return jax.vmap(function, in_axes=in_axes, out_axes=out_axes, axis_name=_MEMBERS, spmd_axis_name=across)


_MEMBERS = "members"


def start_decoding(plan: Plan, params: Any, batch: Batch, traced: TracedSettings) -> tuple[Decoded, PromptCache, Memory]:
    """Decodes the first token of every row; returns what `continue_decoding` needs."""
    made = _start_decoding(plan, params, batch, traced)
    # Committed to their shardings, as the results of `continue_decoding` are, so that its first call runs the same program as its second.
    return jax.device_put(made, jax.tree.map(lambda x: x.sharding, made))


def continue_decoding(
    plan: Plan, params: Any, batch: Batch, traced: TracedSettings, decoded: Decoded, prompt: PromptCache, memory: Memory, until: np.int32
) -> tuple[Decoded, Memory]:
    """Decodes every row up to `until` tokens. Donates `memory`."""
    return _pinned(_decode, (decoded, memory), donated=6)(plan, params, batch, traced, decoded, prompt, memory, until)


def keep_rows(
    plan: Plan,
    batch: Batch,
    decoded: Decoded,
    prompt: PromptCache,
    memory: Memory,
    places_HxP: Int[np.ndarray, "h p"],
    rows_HxB: Int[np.ndarray, "h b"],
) -> tuple[Batch, Decoded, PromptCache, Memory]:
    """A batch under way, of which only some rows go on, in places arranged anew.

    Args:
      places_HxP: for each of the H shards of the rows, the places whose prompts its new places hold, counted from its first one.
      rows_HxB: likewise the rows; no row leaves its shard.
    """
    state = (batch, decoded, prompt, memory)
    return _pinned(_keep_rows, state)(plan, *state, places_HxP, rows_HxB)


def _pinned(function: Callable, state: Any, *, donated: int | None = None) -> Callable:
    """The compiled programs of a function of a plan and more, whose results lie as `state` does, which it takes the place of.

    If the compiler chose their shardings, the next call could need another program.
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: getattr(x, "sharding", None), state))
    key = (function, tuple(leaves), tree)
    if key not in _PROGRAMS:
        shardings = jax.tree.unflatten(tree, leaves)
        _PROGRAMS[key] = jax.jit(function, static_argnums=0, donate_argnums=donated, out_shardings=shardings)
    return _PROGRAMS[key]


def _keep_rows(
    plan: Plan, batch: Batch, decoded: Decoded, prompt: PromptCache, memory: Memory, places_HxP: Int[Array, "h p"], rows_HxB: Int[Array, "h b"]
) -> tuple[Batch, Decoded, PromptCache, Memory]:
    outer = int(plan.members)  # axes before that of places or rows
    layers = outer + int(plan.layout.scan_layers)

    def take(x: Any, kept_HxK: Int[Array, "h k"], axis: int) -> Array:
        # Shard by shard: an index into the whole axis could be anywhere, and every device would gather all of it.
        x_HxK = jnp.reshape(x, (*x.shape[:axis], len(kept_HxK), -1, *x.shape[axis + 1 :]))
        taken = jax.vmap(lambda of_shard, kept: jnp.take(of_shard, kept, axis=axis), in_axes=(axis, 0), out_axes=axis)(x_HxK, kept_HxK)
        return taken.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def places(tree: Any, axis: int) -> Any:
        return jax.tree.map(lambda x: take(x, places_HxP, axis), tree)

    def rows(tree: Any, axis: int) -> Any:
        return jax.tree.map(lambda x: take(x, rows_HxB, axis), tree)

    cache, seen_BxV = memory
    return (
        Batch(places(batch.tokens_PxS, 0), places(batch.valid_PxS, 0), rows(batch.uniform_NxB, 1), rows(batch.greedy_B, 0), rows(batch.limit_B, 0)),
        Decoded(decoded.step, rows(decoded.token_B, outer), rows(decoded.ended_B, outer), rows(decoded.out_NxB, outer + 1)),
        PromptCache(places(prompt.k, layers), places(prompt.v, layers), places(prompt.valid_PxS, outer)),
        Memory(RowCache(rows(cache.k, layers), rows(cache.v, layers), rows(cache.position_B, outer)), rows(seen_BxV, outer)),
    )


_PROGRAMS: dict[Any, Any] = {}  # (function, shardings of its results) → its compiled programs, see `_pinned`


def _cache_size(program: Any) -> int:
    return program._cache_size()


def count_programs() -> int:
    """Number of decoding programs compiled in this process."""
    return _cache_size(complete) + sum(_cache_size(program) for (function, *_), program in _PROGRAMS.items() if function is _decode)


@functools.partial(jax.jit, static_argnums=0)
def _start_decoding(plan: Plan, params: Any, batch: Batch, traced: TracedSettings) -> tuple[Decoded, PromptCache, Memory]:
    return _read(plan, params, batch, traced)


def _read(plan: Plan, params: Any, batch: Batch, traced: TracedSettings) -> tuple[Decoded, PromptCache, Memory]:
    of_one = functools.partial(_read_one, plan)
    return _each_member(plan, of_one, (0, None, None), (_OF_MEMBERS, 0, 0))(params, batch, traced)


def _read_one(plan: Plan, params: Any, batch: Batch, traced: TracedSettings) -> tuple[Decoded, PromptCache, Memory]:
    n_prompts, n_rows = batch.tokens_PxS.shape[0], plan.n_samples + plan.greedy
    logits_PxV, prompt, cache = read_prompts(
        plan.config,
        params,
        jnp.asarray(batch.tokens_PxS),
        jnp.asarray(batch.valid_PxS),
        rows_per_prompt=n_rows,
        slots=plan.max_new_tokens,
        compute_dtype=plan.compute_dtype,
        layout=plan.layout,
    )
    seen_BxV = None
    if plan.penalty:
        seen_PxV = tokens_seen(jnp.asarray(batch.tokens_PxS), jnp.asarray(batch.valid_PxS), plan.config.vocab_size)
        seen_BxV = jnp.repeat(seen_PxV, n_rows, axis=0)
    token_B, seen_BxV = _choose(plan, batch, traced, 0, jnp.repeat(logits_PxV, n_rows, axis=0), seen_BxV)
    out_NxB = jnp.full((plan.max_new_tokens, n_prompts * n_rows), traced.pad_id, jnp.int32).at[0].set(token_B)
    ended_B = jnp.isin(token_B, traced.eos_ids) | (jnp.asarray(batch.limit_B) <= 1)
    return Decoded(jnp.int32(1), token_B, ended_B, out_NxB), prompt, Memory(cache, seen_BxV)


def _decode(
    plan: Plan, params: Any, batch: Batch, traced: TracedSettings, decoded: Decoded, prompt: PromptCache, memory: Memory, until: Any
) -> tuple[Decoded, Memory]:
    of_one = functools.partial(_decode_one, plan)
    axes = (0, None, None, _OF_MEMBERS, 0, 0, None)
    return _each_member(plan, of_one, axes, (_OF_MEMBERS, 0))(params, batch, traced, decoded, prompt, memory, until)


def _decode_one(
    plan: Plan, params: Any, batch: Batch, traced: TracedSettings, decoded: Decoded, prompt: PromptCache, memory: Memory, until: Any
) -> tuple[Decoded, Memory]:
    def unfinished(state):
        (step, _, ended_B, _), _ = state
        going = ~jnp.all(ended_B)
        # One condition for all members: with one for each, the loop would choose between the old and the new cache of every member at every step.
        return (step < until) & (jax.lax.pmax(going.astype(jnp.int32), _MEMBERS) > 0 if plan.members else going)

    def advance(state):
        (step, token_B, ended_B, out_NxB), (cache, seen_BxV) = state
        logits_BxV, cache = decode(plan.config, params, token_B, step - 1, prompt, cache, compute_dtype=plan.compute_dtype, layout=plan.layout)
        token_B, seen_BxV = _choose(plan, batch, traced, step, logits_BxV, seen_BxV)
        token_B = jnp.where(ended_B, traced.pad_id, token_B)
        ended_B |= jnp.isin(token_B, traced.eos_ids) | (step + 1 >= jnp.asarray(batch.limit_B))
        return Decoded(step + 1, token_B, ended_B, out_NxB.at[step].set(token_B)), Memory(cache, seen_BxV)

    return jax.lax.while_loop(unfinished, advance, (decoded, memory))


def _choose(
    plan: Plan, batch: Batch, traced: TracedSettings, step: Any, logits_BxV: Float[Array, "b v"], seen_BxV: Bool[Array, "b v"] | None
) -> tuple[Int[Array, " b"], Bool[Array, "b v"] | None]:
    """The next token of every row, and the tokens seen including it."""
    n_rows = logits_BxV.shape[0]
    if seen_BxV is not None:
        logits_BxV = penalize(logits_BxV, seen_BxV, traced.repetition_penalty)
    token_B = jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    if plan.n_samples:
        kept_BxV = logits_BxV / traced.temperature
        kept_BxV = keep_top_k(kept_BxV, plan.top_k) if plan.top_k else kept_BxV
        kept_BxV = keep_top_p(kept_BxV, traced.top_p) if plan.top_p else kept_BxV
        token_B = jnp.where(jnp.asarray(batch.greedy_B), token_B, draw(kept_BxV, jnp.asarray(batch.uniform_NxB)[step]))
    if seen_BxV is not None:
        seen_BxV = seen_BxV.at[jnp.arange(n_rows), token_B].set(True)
    return token_B, seen_BxV
