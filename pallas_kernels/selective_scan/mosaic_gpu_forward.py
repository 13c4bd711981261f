"""The forward kernel of the selective scan on Hopper: one pass over a row, the state in registers.

A thread has one channel and all numbers of its state, so that nothing is summed over lanes and no value of a token goes
from thread to thread.
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
    softplus_and_sigmoid,
    store,
    zeros,
)

_STAGES = 3  # chunks in shared memory: this one, and two on their way
_GROUP = 4  # tokens whose outputs are written at once


def forward(x, delta, A, B, C, D, gate, delta_bias, starts, initial_state, *, save, interpret):
    """Run the forward pass.

    Args:
        x, delta, gate: [B, T, D] bfloat16 or float32; T a multiple of CHUNK, D of WIDTH; gate may be None.
        A: [D, STATES] float32.
        B, C: [B, T, STATES].
        D, delta_bias: [D] float32, or None.
        starts: [B, T] bool, where the state is reset; or None.
        initial_state: [B, D, STATES] float32, or None.
        save: whether to return the states.
        interpret: run in the interpreter.

    Returns:
        y [B, T, D] in the dtype of x, final_state [B, D, STATES] float32, and with `save` the state before each chunk
        [B, T / CHUNK, D, STATES] in the dtype of x.
    """
    batch, time, channels = x.shape
    chunks = time // CHUNK
    tiles = {"x": x, "delta": delta, "gate": gate}
    tiles = {name: by_warp(array) for name, array in tiles.items() if array is not None}
    of_channel = {"D": D, "delta_bias": delta_bias}
    of_channel = {name: by_warp(array) for name, array in of_channel.items() if array is not None}
    inputs = tiles | of_channel | {"rows": rows(B, C, starts), "A": by_warp_state(A * LOG2_E)}
    if initial_state is not None:
        inputs["initial_state"] = by_warp_state(initial_state)
    outputs = {
        "y": jax.ShapeDtypeStruct(tiles["x"].shape, x.dtype),
        "final_state": jax.ShapeDtypeStruct((batch, channels // LANES, LANES, STATES), F32),
    }
    if save:
        outputs["states"] = jax.ShapeDtypeStruct((batch, chunks, channels // LANES, LANES, STATES), x.dtype)

    def body(*refs, loaded, **smem):
        hbm = dict(zip((*inputs, *outputs), refs, strict=True))
        row, mine = lax.axis_index("row"), pl.ds(4 * lax.axis_index("channels"), 4)
        constant = {name: load(hbm[name].at[mine], WHOLE_CHANNEL) for name in of_channel}

        def fetch(n):
            slot, tokens = lax.rem(n, _STAGES), pl.ds(n * CHUNK, CHUNK)
            for name in tiles:
                plgpu.copy_gmem_to_smem(hbm[name].at[row, tokens, mine], smem[name].at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(hbm["rows"].at[row, tokens], smem["rows"].at[slot], loaded.at[slot])

        def walk(n, state):
            slot = lax.rem(n, _STAGES)
            plgpu.barrier_wait(loaded.at[slot])
            if save:
                store(hbm["states"].at[row, n, mine], state.astype(x.dtype))

            def of_token(name, t):
                return load(smem[name].at[slot, t], WHOLE_CHANNEL).astype(F32)

            def token(t, state):
                shared = (load(smem["rows"].at[slot, t, i], WHOLE_STATE) for i in range(2 if starts is None else 3))
                B_t, C_t, *keep = (along_channels(part, WHOLE) for part in shared)
                size, inner, opening = of_token("delta", t), of_token("x", t), None
                z: Any = None if gate is None else of_token("gate", t)
                if delta_bias is not None and gate is not None:
                    size, opening = softplus_and_sigmoid(size + constant["delta_bias"], z)
                elif delta_bias is not None:
                    size = softplus(size + constant["delta_bias"])
                elif gate is not None:
                    opening = sigmoid(z)
                decay = jnp.exp2(along_states(size, WHOLE) * A_log2)
                for factor in keep:
                    decay = decay * factor
                state = decay * state + along_states(size * inner, WHOLE) * B_t
                y = jnp.sum(state * C_t, axis=2)
                if D is not None:
                    y = y + constant["D"] * inner
                return state, y if gate is None else y * (z * opening)

            # Reads come first and writes last: the compiler cannot tell buffers apart, and a read that follows a write
            # waits for all that is written.
            def walk_group(i, state):
                outputs = []
                for k in range(_GROUP):
                    state, output = token(i * _GROUP + k, state)
                    outputs.append(output.astype(x.dtype))
                for k, output in enumerate(outputs):
                    store(smem["y"].at[lax.rem(n, 2), i * _GROUP + k], output)
                return state

            state = lax.fori_loop(0, CHUNK // _GROUP, walk_group, state)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["y"].at[lax.rem(n, 2)], hbm["y"].at[row, pl.ds(n * CHUNK, CHUNK), mine])

            @pl.when(n + _STAGES < chunks)
            def _():
                fetch(n + _STAGES)

            return state

        for n in range(min(_STAGES, chunks)):
            fetch(n)
        A_log2 = load(hbm["A"].at[mine], WHOLE)
        state = zeros(ALL, WHOLE)
        if initial_state is not None:  # the sum, unlike what is read, has the type of a loop's carry inside shard_map
            state = state + load(hbm["initial_state"].at[row, mine], WHOLE)
        state = lax.fori_loop(0, chunks, walk, state)
        store(hbm["final_state"].at[row, mine], state)
        plgpu.wait_smem_to_gmem(0)

    tile = (CHUNK, 4, LANES)
    scratch: dict[str, Any] = {name: plgpu.SMEM((_STAGES, *tile), array.dtype) for name, array in tiles.items()}
    scratch |= {"rows": plgpu.SMEM((_STAGES, CHUNK, *inputs["rows"].shape[2:]), F32)}
    scratch |= {"y": plgpu.SMEM((2, *tile), x.dtype)}
    scratch |= {"loaded": plgpu.Barrier(num_arrivals=len(tiles) + 1, num_barriers=_STAGES)}
    run = kernel(
        body,
        grid=(channels // WIDTH, batch),
        name="mamba_forward",
        interpret=interpret,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
    )
    y, final_state, *states = run(*inputs.values())
    whole = lambda array: array.reshape(*array.shape[:-3], channels, STATES)
    return y.reshape(x.shape), whole(final_state), *(whole(array) for array in states)
