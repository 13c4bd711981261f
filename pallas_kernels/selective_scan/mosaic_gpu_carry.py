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
    OF_CHANNEL,
    OF_STATE,
    SLICE,
    STATE,
    STATES,
    TOKENS,
    WIDTH,
    along_channels,
    along_states,
    along_tokens,
    by_warp,
    by_warp_state,
    kernel,
    load,
    load_tokens,
    rows,
    sigmoid,
    softplus,
    store,
    zeros,
)

_STAGES = 2  # chunks in shared memory: this one and the next


def written(x, delta, A, B, delta_bias, starts, *, interpret):
    """Return the state after each row from none before it, and exp(A sum of δ), 0 if it is reset on the way.

    Args:
        x, delta, A, B, delta_bias, starts: as `forward` takes them.
        interpret: run in the interpreter.

    Returns:
        Two of [B, D, STATES] float32.
    """
    state, sizes = _walk({"inner": x, "delta": delta}, A, B, delta_bias, starts, reverse=False, interpret=interpret)
    decay = jnp.exp(A * jnp.sum(sizes, axis=1).reshape(*state.shape[:2], 1))
    if starts is not None:
        decay = jnp.where(jnp.any(starts, axis=1)[:, None, None], 0.0, decay)
    return state, decay


def wanted(d_y, gate, delta, A, C, delta_bias, starts, *, interpret):
    """Return the gradient of the state before each row, if that of the state after it is 0: [B, D, STATES] float32."""
    tiles = {"inner": d_y, "delta": delta, "gate": gate}
    return _walk(tiles, A, C, delta_bias, starts, reverse=True, interpret=interpret)[0]


def _walk(tiles, A, row_of_state, delta_bias, starts, *, reverse, interpret):
    """Walk rows from a state of zero; return it, and the step sizes summed to [B, SLICE, D / LANES, LANES]."""
    batch, time, channels = tiles["inner"].shape
    chunks = time // CHUNK
    tiles = {name: by_warp(array) for name, array in tiles.items() if array is not None}
    inputs = tiles | {"rows": rows(row_of_state, row_of_state, starts), "A": by_warp_state(A * LOG2_E)}
    if delta_bias is not None:
        inputs["delta_bias"] = by_warp(delta_bias)
    outputs = (
        jax.ShapeDtypeStruct((batch, channels // LANES, LANES, STATES), F32),
        jax.ShapeDtypeStruct((batch, SLICE, channels // LANES, LANES), F32),
    )

    def body(*refs, loaded, **smem):
        hbm = dict(zip(inputs, refs, strict=False))
        state_out, sizes_out = refs[len(inputs) :]
        row, mine = lax.axis_index("row"), pl.ds(4 * lax.axis_index("channels"), 4)
        bias = None if delta_bias is None else load(hbm["delta_bias"].at[mine], TOKENS.reduce(0))

        def fetch(step):
            slot, n = lax.rem(step, _STAGES), chunks - 1 - step if reverse else step
            tokens = pl.ds(n * CHUNK, CHUNK)
            for name in tiles:
                plgpu.copy_gmem_to_smem(hbm[name].at[row, tokens, mine], smem[name].at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(hbm["rows"].at[row, tokens], smem["rows"].at[slot], loaded.at[slot])

        def walk(step, carry):
            state, sizes = carry
            slot = lax.rem(step, _STAGES)
            tile, shared = {name: smem[name].at[slot] for name in tiles}, smem["rows"].at[slot]
            plgpu.barrier_wait(loaded.at[slot])
            for first in range(0, CHUNK, SLICE):
                size, weight = (load_tokens(tile[name], first) for name in ("delta", "inner"))
                if bias is not None:
                    size = softplus(size + along_tokens(bias))
                if reverse and "gate" in tile:
                    z = load_tokens(tile["gate"], first)
                    weight = weight * (z * sigmoid(z))
                store(smem["size"].at[pl.ds(first, SLICE)], size)
                store(smem["weight"].at[pl.ds(first, SLICE)], weight if reverse else size * weight)
                sizes = sizes + size
            plgpu.commit_smem()

            def token(t, state):
                decay = jnp.exp2(along_states(load(smem["size"].at[t], OF_CHANNEL)) * A_log2)
                if starts is not None:
                    decay = decay * along_channels(load(shared.at[t, 2], OF_STATE))
                weight = along_states(load(smem["weight"].at[t], OF_CHANNEL))
                write = weight * along_channels(load(shared.at[t, 0], OF_STATE))
                return decay * (state + write) if reverse else decay * state + write

            def walk_slice(i, state):
                for k in range(SLICE):
                    t = i * SLICE + k
                    state = token(CHUNK - 1 - t if reverse else t, state)
                return state

            state = lax.fori_loop(0, CHUNK // SLICE, walk_slice, state)
            plgpu.commit_smem()

            @pl.when(step + _STAGES < chunks)
            def _():
                fetch(step + _STAGES)

            return state, sizes

        for step in range(min(_STAGES, chunks)):
            fetch(step)
        A_log2 = load(hbm["A"].at[mine], STATE)
        state, sizes = lax.fori_loop(0, chunks, walk, (zeros(ALL, STATE), zeros((SLICE, 4, LANES), TOKENS)))
        store(state_out.at[row, mine], state)
        store(sizes_out.at[row, :, mine], sizes)

    tile = (CHUNK, 4, LANES)
    scratch: dict[str, Any] = {name: plgpu.SMEM((_STAGES, *tile), array.dtype) for name, array in tiles.items()}
    scratch["rows"] = plgpu.SMEM((_STAGES, CHUNK, *inputs["rows"].shape[2:]), F32)
    scratch |= {name: plgpu.SMEM(tile, F32) for name in ("size", "weight")}
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
