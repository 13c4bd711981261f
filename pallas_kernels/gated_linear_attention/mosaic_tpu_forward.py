"""Forward TPU kernel: one pass over the tokens, chunk by chunk, with the state of every head in VMEM."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear_attention.mosaic_tpu_chunk import (
    Sizes,
    block_specs,
    causal,
    compiler_params,
    document_masks,
    dot,
    exact_gates,
    gate_scratch,
    iota,
    level_weights,
    levels,
    out_struct,
    prepare_gates,
    readable,
    readable_half,
    walk,
    where01,
)


def exact_attention(sizes: Sizes, q: jax.Array, k: jax.Array, g: Any, part: int) -> jax.Array:
    """Return the attention [C, C] of one head inside a chunk, exact for every gate; zero above the diagonal.

    Args:
        sizes: The kernel's sizes.
        q: [C, unit_keys] float32, scaled.
        k: [C, unit_keys] float32.
        g: Maps weights [C, C] to their product with the log2 gates.
        part: Which head of the unit.
    """
    length = sizes.chunk
    one = lambda x: sizes.part(x.astype(sizes.dtype), part, sizes.key_dim)

    def add_level(level: jax.Array, total: jax.Array) -> jax.Array:
        weights, mask = level_weights(length, level)
        decay = jnp.exp2(g(weights))
        return total + jnp.where(mask, dot(one(q * decay), one(k * decay), (1, 1)), 0.0)

    own = jnp.where(iota(length, 0) == iota(length, 1), dot(one(q), one(k), (1, 1)), 0.0)
    return lax.fori_loop(0, levels(length), add_level, own)


def bounded_attention(sizes: Sizes, q: jax.Array, k: jax.Array, v: jax.Array, runs: Any) -> list[Any]:
    """Return the attention of one unit inside a chunk, and what it multiplies: pairs [rows, n] and [n, unit_values].

    Rows are the last ones of the chunk. One head gives one pair, its attention [C, C]. Two heads give two, each the
    attention of both heads on one half of the columns: both fit the matrix unit at once, and half of the rows cannot
    see the later columns.
    """
    length, dtype = sizes.chunk, sizes.dtype
    if sizes.parts == 1:
        return [(jnp.where(readable(length, runs), dot(q, k, (1, 1)), 0.0).astype(dtype), v)]
    found = []
    for first in (0, length // 2):
        half = slice(first, first + length // 2)
        attention = dot(q[first:], sizes.stacked(k[half], sizes.key_dim), (1, 1))
        attention = jnp.where(readable_half(length, first, runs), attention, 0.0).astype(dtype)
        found.append((attention, sizes.stacked(v[half], sizes.value_dim)))
    return found


def _forward_kernel(*refs: Any, sizes: Sizes, has_initial: bool, save_states: bool) -> None:
    refs_left = list(refs)

    def take(wanted: bool = True) -> Any:
        return refs_left.pop(0) if wanted else None

    gated, length = sizes.gate != "none", sizes.chunk
    q_ref, k_ref, v_ref = take(), take(), take()
    g_ref, run_ref, initial_ref = take(gated), take(sizes.packed), take(has_initial)
    out_ref, final_ref, saved_ref, state_ref = take(), take(), take(save_states), take()
    d_ref, middle_ref, flag_ref, pending_ref = take(gated), take(gated), take(gated), take(gated)
    load = lambda ref, rows, lanes: ref[rows, lanes].astype(jnp.float32)

    # The state of a unit is 2^pending * state_ref: the decay from the last reference to the end of the chunk waits
    # for the next one, so that the state is multiplied once per chunk.
    def true_state(unit: int) -> jax.Array:
        return state_ref[unit] * jnp.exp2(sizes.unit_gates(pending_ref[:1, :], unit)) if gated else state_ref[unit]

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for unit in range(sizes.units):
            initial = sizes.load_state(initial_ref, unit) if has_initial else jnp.zeros_like(state_ref[unit])
            state_ref[unit] = initial
        if gated:
            pending_ref[...] = jnp.zeros_like(pending_ref)

    if save_states:
        for unit in range(sizes.units):
            saved_ref[unit] = true_state(unit).astype(saved_ref.dtype)

    def finish(rows: Any, unit: int, q: Any, k: Any, v: Any, attention: Any, state: Any, kept: Any, masks: Any) -> None:
        """Write a unit's output and its state after the chunk: `kept`, plus v^T k."""
        out = dot(q, state.astype(sizes.dtype), (1, 1))
        if masks:
            _, reads, writes, keeps = masks
            out, kept = jnp.where(reads, out, 0.0), jnp.where(keeps, kept, 0.0)
            k = jnp.where(writes, k, jnp.zeros_like(k))
        for pairs, values in attention:
            inside = dot(pairs, values)
            if len(pairs) < length:
                inside = jnp.concatenate([jnp.zeros_like(out[: length - len(pairs)]), inside], axis=0)
            out += inside
        out_ref[rows, sizes.outputs(unit)] = out.astype(out_ref.dtype)
        state_ref[unit] = kept + sizes.diagonal(dot(v, k, (0, 0)))

    def bounded_chunk(chunk: Any) -> None:
        rows = sizes.rows(chunk)
        masks = document_masks(run_ref, rows) if sizes.packed else None
        for unit in range(sizes.units):
            q, k = load(q_ref, rows, sizes.queries(unit)) * sizes.scale, load(k_ref, rows, sizes.keys(unit))
            v = v_ref[rows, sizes.values(unit)].astype(sizes.dtype)
            state = state_ref[unit]
            if gated:
                d = sizes.unit_gates(d_ref[chunk], unit)
                q, k = q * jnp.exp2(d), k * jnp.exp2(-d)
                before = sizes.unit_gates(pending_ref[:1, :] + middle_ref[chunk, :1, :], unit)
                state = state * jnp.exp2(before)
            q, k = q.astype(sizes.dtype), k.astype(sizes.dtype)
            attention = bounded_attention(sizes, q, k, v, masks[0] if masks else None)
            finish(rows, unit, q, k, v, attention, state, state, masks)
        if gated:
            pending_ref[:1, :] = d_ref[chunk, length - 1 :, :]

    def exact_chunk(chunk: Any) -> None:
        rows = sizes.rows(chunk)
        masks = document_masks(run_ref, rows) if sizes.packed else None
        for unit in range(sizes.units):
            q, k = load(q_ref, rows, sizes.queries(unit)) * sizes.scale, load(k_ref, rows, sizes.keys(unit))
            v = v_ref[rows, sizes.values(unit)].astype(sizes.dtype)
            g = exact_gates(sizes, g_ref, rows, unit)
            attention = []
            for part in range(sizes.parts):
                pairs = exact_attention(sizes, q, k, g, part)
                if masks:
                    pairs = jnp.where(readable(length, masks[0]), pairs, 0.0)
                attention.append((pairs.astype(sizes.dtype), sizes.part(v, part, sizes.value_dim)))
            decay = g(where01(causal(length)))
            q = (q * jnp.exp2(decay)).astype(sizes.dtype)
            k = (k * jnp.exp2(g(where01(iota(length, 0) < iota(length, 1))))).astype(sizes.dtype)
            state = true_state(unit)
            kept = state * jnp.exp2(decay[length - 1 :])
            finish(rows, unit, q, k, v, attention, state, kept, masks)
        pending_ref[...] = jnp.zeros_like(pending_ref)

    if gated:
        prepare_gates(sizes, g_ref, d_ref, middle_ref, flag_ref)
    walk(sizes, [0, sizes.chunks - 1], flag_ref, bounded_chunk, exact_chunk)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        for unit in range(sizes.units):
            sizes.store_state(final_ref, unit, true_state(unit))


def forward(
    sizes: Sizes,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: Any,
    run: Any,
    initial: Any,
    *,
    save_states: bool,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Run the forward kernel.

    Args:
        sizes: The kernel's sizes.
        q: [B, T, H*K], T a multiple of the step.
        k: [B, T, H_kv*K].
        v: [B, T, H_kv*V].
        g: None; [B, T, H*K]; or [B, H/h, T, h] for scalar gates, h heads of a grid step. With shared gates, H_kv and
            the heads that the keys of a grid step belong to.
        run: None, or [B, 3, T] float32 as `document_masks` wants it.
        initial: None, or [B, H, K, V] float32.
        save_states: Whether to write the state at the start of every grid step, for the backward pass.
        interpret: As for `pallas_call`.

    Returns:
        out [B, T, H*V], final state [B, H, K, V] float32 and, if asked, states [B, T/step, units, unit_values,
        unit_keys].
    """
    batch, time, _ = q.shape
    blocks, steps = sizes.heads // sizes.block_heads, time // sizes.step
    unit_state = (sizes.units, sizes.unit_values, sizes.unit_keys)
    specs = block_specs(sizes, lambda t: t)
    in_specs = [specs.queries, specs.keys, specs.values, *specs.gates]
    in_specs += [specs.runs] * (run is not None) + [specs.states] * (initial is not None)
    out_shape = [
        out_struct((batch, time, sizes.heads * sizes.value_dim), v.dtype, q),
        out_struct((batch, sizes.heads, sizes.key_dim, sizes.value_dim), jnp.float32, q),
    ]
    if save_states:
        shape = (batch, steps, blocks * sizes.units, sizes.unit_values, sizes.unit_keys)
        out_shape.append(out_struct(shape, sizes.dtype, q))
    scratch: list[Any] = [pltpu.VMEM(unit_state, jnp.float32)]
    if sizes.gate != "none":
        scratch += gate_scratch(sizes)
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes, has_initial=initial is not None, save_states=save_states),
        out_shape=out_shape,
        grid=(batch, blocks, steps),
        in_specs=in_specs,
        out_specs=[specs.outputs, specs.states] + [specs.saved] * save_states,
        scratch_shapes=scratch,
        compiler_params=compiler_params(),
        interpret=interpret,
        name="gla_forward",
    )(*[x for x in (q, k, v, g, run, initial) if x is not None])
