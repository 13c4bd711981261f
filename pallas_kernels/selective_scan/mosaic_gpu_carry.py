"""What a part of a row does to the state that passes through it, on Hopper; for rows that are cut into parts.

A row alone keeps few multiprocessors busy. Its parts are rows to the other kernels, if only the state before each is
known. The state is linear in the one it starts from,

    h_after = exp(A sum of δ) h_before + h_written,        H_before = exp(A sum of δ) H_after + H_wanted

for the gradient, so a part is walked once from a state of zero, without outputs, and the rest is a sum over parts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.mosaic_gpu_tile import (
    ALL,
    CHUNK,
    F32,
    LANES,
    LOG2_E,
    STATES,
    WHOLE,
    WHOLE_CHANNEL,
    WHOLE_STATE,
    WIDTH,
    along_channels,
    along_states,
    by_warp,
    by_warp_state,
    kernel,
    load,
    rows,
    sigmoid,
    softplus,
    store,
    zeros,
)

_STAGES = 3  # chunks in shared memory: this one, and two on their way
_GROUP = 4  # tokens a step of the loop


def written(x, delta, A, B, delta_bias, starts, *, interpret):
    """Return the state after each row from none before it, and exp(A sum of δ), 0 if it is reset on the way.

    Args:
        x, delta, A, B, delta_bias, starts: as `forward` takes them.
        interpret: run in the interpreter.

    Returns:
        Two of [B, D, STATES] float32.
    """
    state, sizes = _walk({"inner": x, "delta": delta}, A, B, delta_bias, starts, reverse=False, interpret=interpret)
    decay = jnp.exp(A * sizes.reshape(*state.shape[:2], 1))
    if starts is not None:
        decay = jnp.where(jnp.any(starts, axis=1)[:, None, None], 0.0, decay)
    return state, decay


def wanted(d_y, gate, delta, A, C, delta_bias, starts, *, interpret):
    """Return the gradient of the state before each row, if that of the state after it is 0: [B, D, STATES] float32."""
    tiles = {"inner": d_y, "delta": delta, "gate": gate}
    return _walk(tiles, A, C, delta_bias, starts, reverse=True, interpret=interpret)[0]


def _walk(tiles, A, row_of_state, delta_bias, starts, *, reverse, interpret):
    """Walk rows from a state of zero; return it, and the sum of the step sizes [B, D / LANES, LANES]."""
    batch, time, channels = tiles["inner"].shape
    chunks = time // CHUNK
    tiles = {name: by_warp(array) for name, array in tiles.items() if array is not None}
    inputs = tiles | {"rows": rows(row_of_state, row_of_state, starts), "A": by_warp_state(A * LOG2_E)}
    if delta_bias is not None:
        inputs["delta_bias"] = by_warp(delta_bias)
    outputs = (
        jax.ShapeDtypeStruct((batch, channels // LANES, LANES, STATES), F32),
        jax.ShapeDtypeStruct((batch, channels // LANES, LANES), F32),
    )

    def body(*refs, loaded, **smem):
        hbm = dict(zip(inputs, refs, strict=False))
        state_out, sizes_out = refs[len(inputs) :]
        row, mine = lax.axis_index("row"), pl.ds(4 * lax.axis_index("channels"), 4)
        bias = None if delta_bias is None else load(hbm["delta_bias"].at[mine], WHOLE_CHANNEL)

        def fetch(step):
            slot, n = lax.rem(step, _STAGES), chunks - 1 - step if reverse else step
            tokens = pl.ds(n * CHUNK, CHUNK)
            for name in tiles:
                plgpu.copy_gmem_to_smem(hbm[name].at[row, tokens, mine], smem[name].at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(hbm["rows"].at[row, tokens], smem["rows"].at[slot], loaded.at[slot])

        def walk(step, carry):
            state, sizes = carry
            slot = lax.rem(step, _STAGES)
            plgpu.barrier_wait(loaded.at[slot])

            def of_token(name, t):
                return load(smem[name].at[slot, t], WHOLE_CHANNEL).astype(F32)

            def row_of_token(t, i):
                return along_channels(load(smem["rows"].at[slot, t, i], WHOLE_STATE), WHOLE)

            def token(t, state, sizes):
                size, weight = of_token("delta", t), of_token("inner", t)
                if bias is not None:
                    size = softplus(size + bias)
                if "gate" in tiles:
                    z = of_token("gate", t)
                    weight = weight * (z * sigmoid(z))
                decay = jnp.exp2(along_states(size, WHOLE) * A_log2)
                if starts is not None:
                    decay = decay * row_of_token(t, 2)
                write = along_states(weight if reverse else size * weight, WHOLE) * row_of_token(t, 0)
                return decay * (state + write) if reverse else decay * state + write, sizes + size

            def walk_group(i, carry):
                for k in range(_GROUP):
                    t = i * _GROUP + k
                    carry = token(CHUNK - 1 - t if reverse else t, *carry)
                return carry

            state, sizes = lax.fori_loop(0, CHUNK // _GROUP, walk_group, (state, sizes))
            plgpu.commit_smem()

            @pl.when(step + _STAGES < chunks)
            def _():
                fetch(step + _STAGES)

            return state, sizes

        for step in range(min(_STAGES, chunks)):
            fetch(step)
        A_log2 = load(hbm["A"].at[mine], WHOLE)
        state, sizes = lax.fori_loop(0, chunks, walk, (zeros(ALL, WHOLE), zeros((4, LANES), WHOLE_CHANNEL)))
        store(state_out.at[row, mine], state)
        store(sizes_out.at[row, mine], sizes)

    tile = (CHUNK, 4, LANES)
    scratch: dict[str, Any] = {name: plgpu.SMEM((_STAGES, *tile), array.dtype) for name, array in tiles.items()}
    scratch["rows"] = plgpu.SMEM((_STAGES, CHUNK, *inputs["rows"].shape[2:]), F32)
    scratch["loaded"] = plgpu.Barrier(num_arrivals=len(tiles) + 1, num_barriers=_STAGES)
    run = kernel(
        body,
        grid=(channels // WIDTH, batch),
        name="mamba_wanted" if reverse else "mamba_written",
        interpret=interpret,
        out_type=outputs,
        scratch_types=scratch,
    )
    state, sizes = run(*inputs.values())
    return state.reshape(batch, channels, STATES), sizes
