"""The forward kernel of the selective scan on Hopper: one pass over a row, the state in registers.

While a chunk is walked token by token, the same loop finishes the outputs of the chunk before it and makes the step
sizes of the chunk after it, a slice of tokens at a time: work for the scheduler while the recurrence waits.
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
    read,
    rows,
    sigmoid,
    softplus,
    store,
    zeros,
)

_STAGES = 4  # chunks in shared memory: the one before, this one, the one after, and one on its way


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
        constant = {name: load(hbm[name].at[mine], TOKENS.reduce(0)) for name in of_channel}

        def fetch(n):
            slot, tokens = lax.rem(n, _STAGES), pl.ds(n * CHUNK, CHUNK)
            for name in tiles:
                plgpu.copy_gmem_to_smem(hbm[name].at[row, tokens, mine], smem[name].at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(hbm["rows"].at[row, tokens], smem["rows"].at[slot], loaded.at[slot])

        def tokens_of(name, n, first):
            return load_tokens(smem[name].at[lax.rem(n, _STAGES)], first)

        # Reads come first and writes last, in a loop body too: the compiler cannot tell buffers apart, and a read that
        # follows a write waits for all that is written.
        def to_prepare(n, first):
            """Return the step sizes of a slice, and what they make of the inputs."""
            size = tokens_of("delta", n, first)
            if delta_bias is not None:
                size = softplus(size + along_tokens(constant["delta_bias"]))
            return size, size * tokens_of("x", n, first)

        def prepare(n, first, values):
            for name, value in zip(("size", "written"), values, strict=True):
                store(smem[name].at[lax.rem(n, 2), pl.ds(first, SLICE)], value)

        def finished(n, first):
            """Return the outputs of a slice."""
            y = load_tokens(smem["written"].at[lax.rem(n, 2)], first)
            if D is not None:
                y = y + along_tokens(constant["D"]) * tokens_of("x", n, first)
            if gate is not None:
                z = tokens_of("gate", n, first)
                y = y * (z * sigmoid(z))
            return y.astype(x.dtype)

        def finish(n, first, y):
            store(smem["y"].at[lax.rem(n, 2), pl.ds(first, SLICE)], y)

        def send(n):
            plgpu.copy_smem_to_gmem(smem["y"].at[lax.rem(n, 2)], hbm["y"].at[row, pl.ds(n * CHUNK, CHUNK), mine])

        def walk(n, state):
            @pl.when(n + 1 < chunks)
            def _():
                plgpu.barrier_wait(loaded.at[lax.rem(n + 1, _STAGES)])

            if save:
                store(hbm["states"].at[row, n, mine], state.astype(x.dtype))
            shared = smem["rows"].at[lax.rem(n, _STAGES)]
            size, written = (smem[name].at[lax.rem(n, 2)] for name in ("size", "written"))

            def operands(t):
                of_states = [load(shared.at[t, i], OF_STATE) for i in range(2 if starts is None else 3)]
                return load(size.at[t], OF_CHANNEL), load(written.at[t], OF_CHANNEL), *of_states

            def token(operands, state):
                size_t, written_t, B_t, C_t, *keep = operands
                decay = jnp.exp2(along_states(size_t) * A_log2)
                for factor in keep:
                    decay = decay * along_channels(factor)
                state = decay * state + along_states(written_t) * along_channels(B_t)
                return state, read(state, C_t, interpret=interpret)

            def walk_slice(i, state):
                first, outputs = i * SLICE, []
                tokens = [operands(first + t) for t in range(SLICE)]
                # The chunk before the first and the one after the last are not there: nothing is made of them.
                before, after = n + 2 * _STAGES - 1, n + 1
                y, prepared = finished(before, first), to_prepare(after, first)
                for values in tokens:
                    state, output = token(values, state)
                    outputs.append(output)
                for t, output in enumerate(outputs):
                    store(written.at[first + t], output)
                finish(before, first, y)
                prepare(after, first, prepared)
                return state

            state = lax.fori_loop(0, CHUNK // SLICE, walk_slice, state)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()

            @pl.when(n > 0)
            def _():
                send(n - 1)

            @pl.when(n + _STAGES - 1 < chunks)
            def _():
                fetch(n + _STAGES - 1)

            return state

        for n in range(min(_STAGES - 1, chunks)):
            fetch(n)
        A_log2 = load(hbm["A"].at[mine], STATE)
        state = zeros(ALL, STATE)
        if initial_state is not None:  # the sum, unlike what is read, has the type of a loop's carry inside shard_map
            state = state + load(hbm["initial_state"].at[row, mine], STATE)
        plgpu.barrier_wait(loaded.at[0])
        for first in range(0, CHUNK, SLICE):
            prepare(0, first, to_prepare(0, first))
        plgpu.commit_smem()
        state = lax.fori_loop(0, chunks, walk, state)
        for first in range(0, CHUNK, SLICE):
            finish(chunks - 1, first, finished(chunks - 1, first))
        plgpu.commit_smem()
        send(chunks - 1)
        store(hbm["final_state"].at[row, mine], state)
        plgpu.wait_smem_to_gmem(0)

    tile = (CHUNK, 4, LANES)
    scratch: dict[str, Any] = {name: plgpu.SMEM((_STAGES, *tile), array.dtype) for name, array in tiles.items()}
    scratch |= {"rows": plgpu.SMEM((_STAGES, CHUNK, *inputs["rows"].shape[2:]), F32)}
    scratch |= {name: plgpu.SMEM((2, *tile), F32) for name in ("size", "written")}
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
