"""Backward TPU kernel: one pass over the tokens from last to first, with the gradient of every head's state in VMEM.

With q' and k' the decayed tiles of a chunk (see mosaic_tpu_chunk), A = q' k'^T and M = do v^T inside the causal mask, S
the state as the chunk read it and U = S + k'^T v as it left it, the gradients of the chunk are

    dq' = M k' + do S^T        dk' = M^T q' + v dU^T        dv = A^T do + k' dU        dS = dU + q'^T do

and that of the gate of token j gathers, all from within the chunk,

    dg_j = sum_{i >= j} (q' dq' - k' M^T q')_i + sum_{i < j} (k' v dU^T)_i + sum_v dU S

with the tiles as they were rounded for the products: the two directions of M then cancel to the last bit where
they must.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear_attention.mosaic_tpu_chunk import (
    LOWEST_GATE,
    Sizes,
    causal,
    compiler_params,
    document_masks,
    dot,
    dot01,
    exact_gates,
    gate_scratch,
    gate_specs,
    iota,
    level_weights,
    levels,
    out_struct,
    prepare_gates,
    split,
    to_column,
    to_row,
    walk,
    where01,
)


def _backward_kernel(*refs: Any, sizes: Sizes, has_initial: bool) -> None:
    refs_left = list(refs)

    def take(wanted: bool = True) -> Any:
        return refs_left.pop(0) if wanted else None

    gated, length, dtype = sizes.gate != "none", sizes.chunk, sizes.dtype
    q_ref, k_ref, v_ref, g_ref, run_ref = take(), take(), take(), take(gated), take(sizes.packed)
    saved_ref, do_ref, dfinal_ref = take(), take(), take()
    dq_ref, dk_ref, dv_ref, dg_ref, dinitial_ref = take(), take(), take(), take(gated), take(has_initial)
    state_ref, states_ref, dstate_ref = take(), take(), take()
    d_ref, middle_ref, flag_ref, pending_ref = take(gated), take(gated), take(gated), take(gated)
    # The gradient of a unit's state at the end of a chunk is 2^dpending * dstate_ref, as the state in the forward pass.
    dpending_ref = take(gated)
    load = lambda ref, rows, lanes: ref[rows, lanes].astype(jnp.float32)
    units = range(sizes.units)

    def scaled(ref: Any, unit: int, exponent: Any) -> jax.Array:
        return ref[unit] * to_column(jnp.exp2(sizes.unit_gates(exponent, unit))) if gated else ref[unit]

    def masked(mask: Any, x: jax.Array) -> jax.Array:
        return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))

    def masks_of(rows: Any) -> tuple[Any, Any, Any, Any]:
        return document_masks(run_ref, rows, length) if sizes.packed else (causal(length), None, None, None)

    def key_part(x: jax.Array, part: int) -> jax.Array:
        return sizes.part(x, part, sizes.key_dim)

    def value_part(x: jax.Array, part: int) -> jax.Array:
        return sizes.part(x, part, sizes.value_dim)

    # First the states, forwards from the one saved at the start of the step.

    def enter(chunk: Any) -> None:
        """Keep the state as the chunk reads it: seen from the chunk's middle if it is bounded, else from its start."""
        for unit in units:
            state = state_ref[unit]
            if gated:
                middle = jnp.where(flag_ref[chunk] == 0, middle_ref[chunk, :1, :], 0.0)
                state = scaled(state_ref, unit, pending_ref[:1, :] + middle)
            states_ref[chunk, unit] = state.astype(dtype)
            state_ref[unit] = state

    def advance_bounded(chunk: Any) -> None:
        rows = sizes.rows(chunk)
        _, _, writes, keeps = masks_of(rows)
        for unit in units:
            k = load(k_ref, rows, sizes.keys(unit))
            if gated:
                k = k * jnp.exp2(-sizes.unit_gates(d_ref[chunk], unit))
            v = v_ref[rows, sizes.values(unit)].astype(dtype)
            update = sizes.diagonal(dot(masked(writes, k.astype(dtype)), v, (0, 0)))
            state_ref[unit] = masked(keeps, state_ref[unit]) + update
        if gated:
            pending_ref[:1, :] = d_ref[chunk, length - 1 :, :]
        enter(chunk + 1)

    def advance_exact(chunk: Any) -> None:
        rows = sizes.rows(chunk)
        _, _, writes, keeps = masks_of(rows)
        for unit in units:
            g = exact_gates(sizes, g_ref, rows, unit)
            k = load(k_ref, rows, sizes.keys(unit)) * jnp.exp2(g(where01(iota(length, 0) < iota(length, 1))))
            v = v_ref[rows, sizes.values(unit)].astype(dtype)
            update = sizes.diagonal(dot(masked(writes, k.astype(dtype)), v, (0, 0)))
            total = jnp.exp2(g(where01(causal(length)))[length - 1 :])
            state_ref[unit] = masked(keeps, state_ref[unit] * to_column(total)) + update
        pending_ref[...] = jnp.zeros_like(pending_ref)
        enter(chunk + 1)

    # Then the gradients, backwards.

    def gate_gradient(reading: jax.Array, writing: jax.Array, through: jax.Array) -> jax.Array:
        """Return sum_{i >= j} reading_i + sum_{i < j} writing_i + through; through [1, ..] is that of the state."""
        from_here = where01(iota(length, 0) <= iota(length, 1))
        total = jnp.sum(writing, axis=0, keepdims=True) + through
        return dot01(from_here, reading - writing, 2 if dtype == jnp.bfloat16 else 3) + total

    def store_gate_gradient(rows: Any, terms: list[tuple[jax.Array, jax.Array, jax.Array]], extra: Any = None) -> None:
        """Write the gates' gradient from (reading, writing, through) of each unit.

        An extra tile of each unit is added: what the dyadic levels of an exact chunk contribute. Only those chunks hold
        gates that let nothing through, and those have no gradient; without the mask it would be rounding noise.
        """

        def store(lanes: Any, dg: jax.Array, more: Any) -> None:
            if more is not None:
                dg = jnp.where(load(g_ref, rows, lanes) > LOWEST_GATE, dg + more, 0.0)
            dg_ref[rows, lanes] = dg.astype(dg_ref.dtype)

        if sizes.gate == "channel":
            for unit, term in enumerate(terms):
                store(sizes.keys(unit), gate_gradient(*term), None if extra is None else extra[unit])
            return

        def heads(tiles: Any) -> jax.Array:
            sums = [jnp.sum(key_part(x, i), axis=1, keepdims=True) for x in tiles for i in range(sizes.parts)]
            return sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=1)

        reading, writing, through = (heads(tiles) for tiles in zip(*terms, strict=True))
        store(slice(None), gate_gradient(reading, writing, through), None if extra is None else heads(extra))

    def state_product(state: jax.Array, dstate: jax.Array, keeps: Any) -> jax.Array:
        """Return sum_v dU S as a row."""
        product = jnp.sum(dstate * state.astype(jnp.float32), axis=1, keepdims=True)
        return masked(keeps, to_row(product))

    def backward_bounded(chunk: Any) -> None:
        rows = sizes.rows(chunk)
        pairs, reads, writes, keeps = masks_of(rows)
        terms = []
        for unit in units:
            q, k = load(q_ref, rows, sizes.keys(unit)) * sizes.scale, load(k_ref, rows, sizes.keys(unit))
            if gated:
                d = sizes.unit_gates(d_ref[chunk], unit)
                grow, shrink = jnp.exp2(d), jnp.exp2(-d)
                q, k = q * grow, k * shrink
            q, k = q.astype(dtype), k.astype(dtype)
            v, do = v_ref[rows, sizes.values(unit)].astype(dtype), do_ref[rows, sizes.values(unit)].astype(dtype)
            state = states_ref[chunk, unit]
            dstate = scaled(dstate_ref, unit, d_ref[chunk, length - 1 :, :] + dpending_ref[:1, :] if gated else None)
            dstate16 = dstate.astype(dtype)
            read_do = masked(reads, do)
            dq = dot(read_do, state, (1, 1))
            dk_state = dot(masked(writes, v), dstate16, (1, 1))
            dv = dot(masked(writes, k), dstate16)
            dk_inside = jnp.zeros_like(dk_state)
            for part in range(sizes.parts):
                attention = jnp.where(pairs, dot(q, key_part(k, part), (1, 1)), 0.0).astype(dtype)
                dattention = jnp.where(pairs, dot(do, value_part(v, part), (1, 1)), 0.0).astype(dtype)
                dq += dot(dattention, key_part(k, part))
                dk_inside += dot(dattention, key_part(q, part), (0, 0))
                dv += dot(attention, value_part(do, part), (0, 0))
            dv_ref[rows, sizes.values(unit)] = dv.astype(dv_ref.dtype)
            dstate_ref[unit] = masked(keeps, dstate) + sizes.diagonal(dot(q, read_do, (0, 0)))
            if gated:
                q, k = q.astype(jnp.float32), k.astype(jnp.float32)
                terms.append((q * dq - k * dk_inside, k * dk_state, state_product(state, dstate, keeps)))
                dq_ref[rows, sizes.keys(unit)] = (dq * (grow * sizes.scale)).astype(dq_ref.dtype)
                dk_ref[rows, sizes.keys(unit)] = ((dk_inside + dk_state) * shrink).astype(dk_ref.dtype)
            else:
                dq_ref[rows, sizes.keys(unit)] = (dq * sizes.scale).astype(dq_ref.dtype)
                dk_ref[rows, sizes.keys(unit)] = (dk_inside + dk_state).astype(dk_ref.dtype)
        if gated:
            store_gate_gradient(rows, terms)
            dpending_ref[:1, :] = middle_ref[chunk, :1, :]

    def backward_exact(chunk: Any) -> None:
        rows = sizes.rows(chunk)
        pairs, reads, writes, keeps = masks_of(rows)
        diagonal = iota(length, 0) == iota(length, 1)
        terms, extra = [], []
        for unit in units:
            q, k = load(q_ref, rows, sizes.keys(unit)) * sizes.scale, load(k_ref, rows, sizes.keys(unit))
            v, do = v_ref[rows, sizes.values(unit)].astype(dtype), do_ref[rows, sizes.values(unit)].astype(dtype)
            g = exact_gates(sizes, g_ref, rows, unit)
            from_start = g(where01(causal(length)))
            grow, shrink = jnp.exp2(from_start), jnp.exp2(g(where01(iota(length, 0) < iota(length, 1))))
            total = jnp.exp2(from_start[length - 1 :])
            reading_q, writing_k = (q * grow).astype(dtype), (k * shrink).astype(dtype)
            state, dstate = states_ref[chunk, unit], scaled(dstate_ref, unit, dpending_ref[:1, :])
            dstate16 = dstate.astype(dtype)
            read_do = masked(reads, do)
            dq_state = dot(read_do, state, (1, 1))
            dk_state = dot(masked(writes, v), dstate16, (1, 1))
            dv = dot(masked(writes, writing_k), dstate16)
            dq, dk, dg = dq_state * grow, dk_state * shrink, jnp.zeros_like(q)
            for part in range(sizes.parts):
                dattention = jnp.where(pairs, dot(do, value_part(v, part), (1, 1)), 0.0)
                one_q, one_k = key_part(q, part), key_part(k, part)

                def level(
                    weights: Any, mask: Any, carry: Any, gate: Any, tiles: Any = (one_q, one_k, dattention)
                ) -> Any:
                    (one_q, one_k, dattention), (attention, dq, dk, dg) = tiles, carry
                    decay = jnp.exp2(gate) if gate is not None else jnp.ones_like(one_q)
                    level_q, level_k = (one_q * decay).astype(dtype), (one_k * decay).astype(dtype)
                    attention += jnp.where(mask, dot(level_q, level_k, (1, 1)), 0.0)
                    inside = jnp.where(mask, dattention, 0.0).astype(dtype)
                    level_dq, level_dk = dot(inside, level_k), dot(inside, level_q, (0, 0))
                    if gate is not None:
                        product = level_q.astype(jnp.float32) * level_dq + level_k.astype(jnp.float32) * level_dk
                        dg += sum(dot(weights.astype(jnp.bfloat16), part, (0, 0)) for part in split(product, 3))
                    return attention, dq + level_dq * decay, dk + level_dk * decay, dg

                def dyadic(index: jax.Array, carry: Any, level: Any = level, g: Any = g) -> Any:
                    weights, mask = level_weights(length, index)
                    return level(weights, mask, carry, g(weights))

                carry = level(None, diagonal, (jnp.zeros((length, length), jnp.float32), dq, dk, dg), None)
                attention, dq, dk, dg = lax.fori_loop(0, levels(length), dyadic, carry)
                dv += dot(masked(pairs, attention).astype(dtype), value_part(do, part), (0, 0))
            dv_ref[rows, sizes.values(unit)] = dv.astype(dv_ref.dtype)
            dq_ref[rows, sizes.keys(unit)] = (dq * sizes.scale).astype(dq_ref.dtype)
            dk_ref[rows, sizes.keys(unit)] = dk.astype(dk_ref.dtype)
            through = state_product(state, dstate, keeps) * total
            terms.append((reading_q.astype(jnp.float32) * dq_state, writing_k.astype(jnp.float32) * dk_state, through))
            extra.append(dg)
            kept = masked(keeps, dstate * to_column(total))
            dstate_ref[unit] = kept + sizes.diagonal(dot(reading_q, read_do, (0, 0)))
        store_gate_gradient(rows, terms, extra)
        dpending_ref[...] = jnp.zeros_like(dpending_ref)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for unit in units:
            dstate_ref[unit] = sizes.load_state(dfinal_ref, unit)
        if gated:
            dpending_ref[...] = jnp.zeros_like(dpending_ref)

    if gated:
        prepare_gates(sizes, g_ref, d_ref, middle_ref, flag_ref)
        pending_ref[...] = jnp.zeros_like(pending_ref)
    for unit in units:
        state_ref[unit] = saved_ref[unit].astype(jnp.float32)
    enter(0)
    last = sizes.chunks - 1
    if last:
        walk(sizes, [0, last - 1], flag_ref, advance_bounded, advance_exact)
    walk(sizes, [last, 0], flag_ref, backward_bounded, backward_exact)

    if has_initial:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _() -> None:
            for unit in units:
                sizes.store_state(dinitial_ref, unit, scaled(dstate_ref, unit, dpending_ref[:1, :] if gated else None))


def backward(
    sizes: Sizes,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: Any,
    run: Any,
    saved: jax.Array,
    dout: jax.Array,
    dfinal: jax.Array,
    *,
    has_initial: bool,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Run the backward kernel.

    Args:
        sizes: The kernel's sizes, those of the forward kernel that saved the states.
        q: [B, T, H*K], T a multiple of the step.
        k: [B, T, H*K].
        v: [B, T, H*V].
        g: As for `forward`.
        run: As for `forward`.
        saved: [B, T/step, units, unit_keys, unit_values], the states at the start of every grid step.
        dout: [B, T, H*V].
        dfinal: [B, H, K, V] float32.
        has_initial: Whether the initial state's gradient is wanted.
        interpret: As for `pallas_call`.

    Returns:
        The gradients of q, k, v, of g unless it is None, and of the initial state if wanted.
    """
    batch, time, _ = q.shape
    blocks, steps = sizes.heads // sizes.block_heads, time // sizes.step
    unit_state = (sizes.units, sizes.unit_keys, sizes.unit_values)
    back = lambda t: steps - 1 - t
    keys = pl.BlockSpec((None, sizes.step, sizes.units * sizes.unit_keys), lambda b, h, t: (b, back(t), h))
    values = pl.BlockSpec((None, sizes.step, sizes.units * sizes.unit_values), lambda b, h, t: (b, back(t), h))
    state = pl.BlockSpec((None, sizes.block_heads, sizes.key_dim, sizes.value_dim), lambda b, h, t: (b, h, 0, 0))
    states = pl.BlockSpec((None, None, *unit_state), lambda b, h, t: (b, back(t), h, 0, 0))
    runs = pl.BlockSpec((None, 3, sizes.step), lambda b, h, t: (b, 0, back(t)))
    gates = gate_specs(sizes, back)
    args = [x for x in (q, k, v, g, run, saved, dout, dfinal) if x is not None]
    out_shape = [out_struct(x.shape, x.dtype, q) for x in (q, k, v, g) if x is not None]
    if has_initial:
        out_shape.append(out_struct(dfinal.shape, jnp.float32, q))
    scratch: list[Any] = [
        pltpu.VMEM(unit_state, jnp.float32),
        pltpu.VMEM((sizes.chunks, *unit_state), sizes.dtype),
        pltpu.VMEM(unit_state, jnp.float32),
    ]
    if sizes.gate != "none":
        scratch += [*gate_scratch(sizes), pltpu.VMEM((8, sizes.gate_width), jnp.float32)]
    return pl.pallas_call(
        functools.partial(_backward_kernel, sizes=sizes, has_initial=has_initial),
        out_shape=out_shape,
        grid=(batch, blocks, steps),
        in_specs=[keys, keys, values, *gates, *[runs] * (run is not None), states, values, state],
        out_specs=[keys, keys, values, *gates, *[state] * has_initial],
        scratch_shapes=scratch,
        compiler_params=compiler_params(),
        interpret=interpret,
        name="gla_backward",
    )(*args)
