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
    block_specs,
    causal,
    compiler_params,
    document_masks,
    dot,
    dot01,
    exact_gates,
    gate_scratch,
    iota,
    level_weights,
    levels,
    out_struct,
    prepare_gates,
    readable,
    split,
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
        return ref[unit] * jnp.exp2(sizes.unit_gates(exponent, unit)) if gated else ref[unit]

    def masked(mask: Any, x: jax.Array) -> jax.Array:
        return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))

    def masks_of(rows: Any) -> tuple[Any, Any, Any, Any]:
        return document_masks(run_ref, rows) if sizes.packed else (None, None, None, None)

    def key_part(x: jax.Array, part: int) -> jax.Array:
        return sizes.part(x, part, sizes.key_dim)

    def value_part(x: jax.Array, part: int) -> jax.Array:
        return sizes.part(x, part, sizes.value_dim)

    def store_shared(rows: Any, unit: int, sums: list[Any], dk: jax.Array, dv: jax.Array) -> None:
        """Add up over the units that share keys and values, and write what their last one completes."""
        sums[:] = [dk, dv] if unit % sizes.group == 0 else [sums[0] + dk, sums[1] + dv]
        if (unit + 1) % sizes.group == 0 or unit == sizes.units - 1:
            dk_ref[rows, sizes.keys(unit)] = sums[0].astype(dk_ref.dtype)
            dv_ref[rows, sizes.values(unit)] = sums[1].astype(dv_ref.dtype)

    def add_term(terms: list[Any], unit: int, term: tuple[jax.Array, ...]) -> None:
        """Append a unit's term of the gates' gradient, or add it to that of the unit that has the same gates."""
        if sizes.gate_unit(unit) == len(terms):
            terms.append(term)
        else:
            terms[-1] = tuple(x + y for x, y in zip(terms[-1], term, strict=True))

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
            update = sizes.diagonal(dot(v, masked(writes, k.astype(dtype)), (0, 0)))
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
            update = sizes.diagonal(dot(v, masked(writes, k.astype(dtype)), (0, 0)))
            total = jnp.exp2(g(where01(causal(length)))[length - 1 :])
            state_ref[unit] = masked(keeps, state_ref[unit] * total) + update
        pending_ref[...] = jnp.zeros_like(pending_ref)
        enter(chunk + 1)

    # Then the gradients, backwards.

    def gate_gradient(reading: jax.Array, writing: jax.Array, through: jax.Array, exact: bool) -> jax.Array:
        """Return sum_{i >= j} reading_i + sum_{i < j} writing_i + through; through [1, ..] is that of the state."""
        from_here, split_terms = where01(iota(length, 0) <= iota(length, 1)), 2 if dtype == jnp.bfloat16 else 3
        if exact:  # under strong gates, what was written before j is too little to be told as a difference of sums
            before = dot01(1.0 - from_here, writing, split_terms)
            return dot01(from_here, reading, split_terms) + before + through
        total = jnp.sum(writing, axis=0, keepdims=True) + through
        return dot01(from_here, reading - writing, split_terms) + total

    def store_gate_gradient(rows: Any, terms: list[Any], extra: Any = None) -> None:
        """Write the gates' gradient from (reading, writing, through) of each unit of gates.

        An extra tile of each is added: what the dyadic levels of an exact chunk contribute. Only those chunks hold
        gates that let nothing through, and those have no gradient; without the mask it would be rounding noise.
        """

        def store(lanes: Any, dg: jax.Array, more: Any) -> None:
            if more is not None:
                dg = jnp.where(load(g_ref, rows, lanes) > LOWEST_GATE, dg + more, 0.0)
            dg_ref[rows, lanes] = dg.astype(dg_ref.dtype)

        if sizes.gate == "channel":
            for unit, (reading, writing, through) in enumerate(terms):
                dg = gate_gradient(reading, writing, through, extra is not None)
                store(sizes.queries(unit), dg, None if extra is None else extra[unit][0])
            return

        def heads(tiles: Any) -> jax.Array:
            sums = [jnp.sum(key_part(x, i), axis=1, keepdims=True) for x in tiles for i in range(sizes.parts)]
            return sums[0] if len(sums) == 1 else jnp.concatenate(sums, axis=1)

        reading, writing, through = (heads(tiles) for tiles in zip(*terms, strict=True))
        store(
            slice(None),
            gate_gradient(reading, writing, through, exact=extra is not None),
            None if extra is None else heads([x for (x,) in extra]),
        )

    def state_product(state: jax.Array, dstate: jax.Array, keeps: Any) -> jax.Array:
        """Return sum_v dU S as a row."""
        return masked(keeps, jnp.sum(dstate * state.astype(jnp.float32), axis=0, keepdims=True))

    def backward_bounded(chunk: Any) -> None:
        rows = sizes.rows(chunk)
        runs, reads, writes, keeps = masks_of(rows)
        pairs = readable(length, runs)
        terms: list[Any] = []
        sums: list[Any] = []
        for unit in units:
            q, k = load(q_ref, rows, sizes.queries(unit)) * sizes.scale, load(k_ref, rows, sizes.keys(unit))
            if gated:
                d = sizes.unit_gates(d_ref[chunk], unit)
                grow, shrink = jnp.exp2(d), jnp.exp2(-d)
                q, k = q * grow, k * shrink
            q, k = q.astype(dtype), k.astype(dtype)
            v, do = v_ref[rows, sizes.values(unit)].astype(dtype), do_ref[rows, sizes.outputs(unit)].astype(dtype)
            state = states_ref[chunk, unit]
            dstate = scaled(dstate_ref, unit, d_ref[chunk, length - 1 :, :] + dpending_ref[:1, :] if gated else None)
            dstate16 = dstate.astype(dtype)
            read_do = masked(reads, do)
            dq = dot(read_do, state)
            dk_state = dot(masked(writes, v), dstate16)
            dv = dot(masked(writes, k), dstate16, (1, 1))
            dk_inside = jnp.zeros_like(dk_state)
            for part in range(sizes.parts):
                attention = jnp.where(pairs, dot(q, key_part(k, part), (1, 1)), 0.0).astype(dtype)
                dattention = jnp.where(pairs, dot(do, value_part(v, part), (1, 1)), 0.0).astype(dtype)
                dq += dot(dattention, key_part(k, part))
                dk_inside += dot(dattention, key_part(q, part), (0, 0))
                dv += dot(attention, value_part(do, part), (0, 0))
            dstate_ref[unit] = masked(keeps, dstate) + sizes.diagonal(dot(read_do, q, (0, 0)))
            dk = dk_inside + dk_state
            if gated:
                q, k = q.astype(jnp.float32), k.astype(jnp.float32)
                through = state_product(state, dstate, keeps)
                add_term(terms, unit, (q * dq - k * dk_inside, k * dk_state, through))
                dq, dk = dq * grow, dk * shrink
            dq_ref[rows, sizes.queries(unit)] = (dq * sizes.scale).astype(dq_ref.dtype)
            store_shared(rows, unit, sums, dk, dv)
        if gated:
            store_gate_gradient(rows, terms)
            dpending_ref[:1, :] = middle_ref[chunk, :1, :]

    def backward_exact(chunk: Any) -> None:
        rows = sizes.rows(chunk)
        runs, reads, writes, keeps = masks_of(rows)
        pairs = readable(length, runs)
        diagonal = iota(length, 0) == iota(length, 1)
        terms: list[Any] = []
        extra: list[Any] = []
        sums: list[Any] = []
        for unit in units:
            q, k = load(q_ref, rows, sizes.queries(unit)) * sizes.scale, load(k_ref, rows, sizes.keys(unit))
            v, do = v_ref[rows, sizes.values(unit)].astype(dtype), do_ref[rows, sizes.outputs(unit)].astype(dtype)
            g = exact_gates(sizes, g_ref, rows, unit)
            from_start = g(where01(causal(length)))
            grow, shrink = jnp.exp2(from_start), jnp.exp2(g(where01(iota(length, 0) < iota(length, 1))))
            total = jnp.exp2(from_start[length - 1 :])
            reading_q, writing_k = (q * grow).astype(dtype), (k * shrink).astype(dtype)
            state, dstate = states_ref[chunk, unit], scaled(dstate_ref, unit, dpending_ref[:1, :])
            dstate16 = dstate.astype(dtype)
            read_do = masked(reads, do)
            dq_state = dot(read_do, state)
            dk_state = dot(masked(writes, v), dstate16)
            dv = dot(masked(writes, writing_k), dstate16, (1, 1))
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
                dv += dot(jnp.where(pairs, attention, 0.0).astype(dtype), value_part(do, part), (0, 0))
            dq_ref[rows, sizes.queries(unit)] = (dq * sizes.scale).astype(dq_ref.dtype)
            store_shared(rows, unit, sums, dk, dv)
            through = state_product(state, dstate, keeps) * total
            term = reading_q.astype(jnp.float32) * dq_state, writing_k.astype(jnp.float32) * dk_state, through
            add_term(terms, unit, term)
            add_term(extra, unit, (dg,))
            kept = masked(keeps, dstate * total)
            dstate_ref[unit] = kept + sizes.diagonal(dot(read_do, reading_q, (0, 0)))
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
        k: [B, T, H_kv*K].
        v: [B, T, H_kv*V].
        g: As for `forward`.
        run: As for `forward`.
        saved: [B, T/step, units, unit_values, unit_keys], the states at the start of every grid step.
        dout: [B, T, H*V].
        dfinal: [B, H, K, V] float32.
        has_initial: Whether the initial state's gradient is wanted.
        interpret: As for `pallas_call`.

    Returns:
        The gradients of q, k, v, of g unless it is None, and of the initial state if wanted. Where the units of several
        grid steps share keys, those of k, v and shared gates are one part for each of them, next to each other.
    """
    batch, time, _ = q.shape
    blocks, steps = sizes.heads // sizes.block_heads, time // sizes.step
    unit_state = (sizes.units, sizes.unit_values, sizes.unit_keys)
    specs = block_specs(sizes, lambda t: steps - 1 - t)
    own = block_specs(sizes, lambda t: steps - 1 - t, shared=False)
    args = [x for x in (q, k, v, g, run, saved, dout, dfinal) if x is not None]
    key_heads = blocks * sizes.key_units * sizes.parts
    out_shape = [
        out_struct(q.shape, q.dtype, q),
        out_struct((batch, time, key_heads * sizes.key_dim), k.dtype, q),
        out_struct((batch, time, key_heads * sizes.value_dim), v.dtype, q),
    ]
    if sizes.gate == "scalar":
        out_shape.append(out_struct((batch, blocks, *g.shape[2:]), g.dtype, q))
    elif sizes.gate == "channel":
        out_shape.append(out_struct((batch, time, blocks * sizes.gate_width), g.dtype, q))
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
        in_specs=[
            *(specs.queries, specs.keys, specs.values, *specs.gates),
            *([specs.runs] * (run is not None)),
            *(specs.saved, specs.outputs, specs.states),
        ],
        out_specs=[own.queries, own.keys, own.values, *own.gates, *[own.states] * has_initial],
        scratch_shapes=scratch,
        compiler_params=compiler_params(),
        interpret=interpret,
        name="gla_backward",
    )(*args)
