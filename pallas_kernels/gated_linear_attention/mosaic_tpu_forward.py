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
    causal,
    compiler_params,
    document_masks,
    dot,
    exact_gates,
    gate_scratch,
    gate_specs,
    iota,
    level_weights,
    levels,
    out_struct,
    prepare_gates,
    to_column,
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
    def pending(unit: int) -> jax.Array:
        return to_column(jnp.exp2(sizes.unit_gates(pending_ref[:1, :], unit)))

    def true_state(unit: int) -> jax.Array:
        return state_ref[unit] * pending(unit) if gated else state_ref[unit]

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

    def finish(rows: Any, unit: int, q: Any, k: Any, attention: Any, state: Any, kept: Any, masks: Any) -> None:
        """Write a unit's output and its state after the chunk: `kept`, plus k^T v."""
        v = v_ref[rows, sizes.values(unit)].astype(sizes.dtype)
        out = dot(q, state.astype(sizes.dtype))
        if masks:
            _, reads, writes, keeps = masks
            out, kept = jnp.where(reads, out, 0.0), jnp.where(keeps, kept, 0.0)
            k = jnp.where(writes, k, jnp.zeros_like(k))
        for part in range(sizes.parts):
            out += dot(attention[part].astype(sizes.dtype), sizes.part(v, part, sizes.value_dim))
        out_ref[rows, sizes.values(unit)] = out.astype(out_ref.dtype)
        state_ref[unit] = kept + sizes.diagonal(dot(k, v, (0, 0)))

    def bounded_chunk(chunk: Any) -> None:
        rows = sizes.rows(chunk)
        masks = document_masks(run_ref, rows, length) if sizes.packed else None
        pairs = masks[0] if masks else causal(length)
        for unit in range(sizes.units):
            q, k = load(q_ref, rows, sizes.keys(unit)) * sizes.scale, load(k_ref, rows, sizes.keys(unit))
            state = state_ref[unit]
            if gated:
                d = sizes.unit_gates(d_ref[chunk], unit)
                q, k = q * jnp.exp2(d), k * jnp.exp2(-d)
                before = sizes.unit_gates(pending_ref[:1, :] + middle_ref[chunk, :1, :], unit)
                state = state * to_column(jnp.exp2(before))
            q, k = q.astype(sizes.dtype), k.astype(sizes.dtype)
            attention = [
                jnp.where(pairs, dot(q, sizes.part(k, part, sizes.key_dim), (1, 1)), 0.0) for part in range(sizes.parts)
            ]
            finish(rows, unit, q, k, attention, state, state, masks)
        if gated:
            pending_ref[:1, :] = d_ref[chunk, length - 1 :, :]

    def exact_chunk(chunk: Any) -> None:
        rows = sizes.rows(chunk)
        masks = document_masks(run_ref, rows, length) if sizes.packed else None
        for unit in range(sizes.units):
            q, k = load(q_ref, rows, sizes.keys(unit)) * sizes.scale, load(k_ref, rows, sizes.keys(unit))
            g = exact_gates(sizes, g_ref, rows, unit)
            attention = [exact_attention(sizes, q, k, g, part) for part in range(sizes.parts)]
            if masks:
                attention = [jnp.where(masks[0], a, 0.0) for a in attention]
            decay = g(where01(causal(length)))
            q = (q * jnp.exp2(decay)).astype(sizes.dtype)
            k = (k * jnp.exp2(g(where01(iota(length, 0) < iota(length, 1))))).astype(sizes.dtype)
            state = true_state(unit)
            finish(rows, unit, q, k, attention, state, state * to_column(jnp.exp2(decay[length - 1 :])), masks)
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
        k: [B, T, H*K].
        v: [B, T, H*V].
        g: None; [B, T, H*K]; or [B, H/h, T, h] for scalar gates, h heads of a grid step.
        run: None, or [B, 3, T] float32 as `document_masks` wants it.
        initial: None, or [B, H, K, V] float32.
        save_states: Whether to write the state at the start of every grid step, for the backward pass.
        interpret: As for `pallas_call`.

    Returns:
        out [B, T, H*V], final state [B, H, K, V] float32 and, if asked, states [B, T/step, units, unit_keys,
        unit_values].
    """
    batch, time, _ = q.shape
    blocks, steps = sizes.heads // sizes.block_heads, time // sizes.step
    unit_state = (sizes.units, sizes.unit_keys, sizes.unit_values)
    keys = pl.BlockSpec((None, sizes.step, sizes.units * sizes.unit_keys), lambda b, h, t: (b, t, h))
    values = pl.BlockSpec((None, sizes.step, sizes.units * sizes.unit_values), lambda b, h, t: (b, t, h))
    state = pl.BlockSpec((None, sizes.block_heads, sizes.key_dim, sizes.value_dim), lambda b, h, t: (b, h, 0, 0))
    saved = pl.BlockSpec((None, None, *unit_state), lambda b, h, t: (b, t, h, 0, 0))
    runs = pl.BlockSpec((None, 3, sizes.step), lambda b, h, t: (b, 0, t))
    in_specs = [keys, keys, values, *gate_specs(sizes, lambda t: t)]
    in_specs += [runs] * (run is not None) + [state] * (initial is not None)
    out_shape = [
        out_struct(v.shape, v.dtype, q),
        out_struct((batch, sizes.heads, sizes.key_dim, sizes.value_dim), jnp.float32, q),
    ]
    if save_states:
        shape = (batch, steps, blocks * sizes.units, sizes.unit_keys, sizes.unit_values)
        out_shape.append(out_struct(shape, sizes.dtype, q))
    scratch: list[Any] = [pltpu.VMEM(unit_state, jnp.float32)]
    if sizes.gate != "none":
        scratch += gate_scratch(sizes)
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes=sizes, has_initial=initial is not None, save_states=save_states),
        out_shape=out_shape,
        grid=(batch, blocks, steps),
        in_specs=in_specs,
        out_specs=[values, state] + [saved] * save_states,
        scratch_shapes=scratch,
        compiler_params=compiler_params(),
        interpret=interpret,
        name="gla_forward",
    )(*[x for x in (q, k, v, g, run, initial) if x is not None])
