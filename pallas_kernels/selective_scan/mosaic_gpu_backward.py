"""The backward kernel of the selective scan on Hopper: one pass over a row from its end, both states in registers.

With H_t the gradient of the state after token t, v_t that of y_t before the gate, and d_t = exp(δ_t A),

    H_t = d_{t+1} H_{t+1} + v_t C_t          dB_t = sum over channels of δ_t x_t H_t        dC_t = sum of v_t h_t
    P_t = d_t H_t h_{t-1}                    dA  = sum_t δ_t P_t                            dδ_t = x_t B_t H_t + A P_t

The states h come back in two passes over a chunk, from the state before it that the forward pass saved: the first keeps
the state before every few tokens in shared memory, rounded as the forward pass rounds what it saves, the second what
those tokens need in registers.
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
    read_each,
    rows,
    sigmoid,
    softplus,
    store,
    sum_channels,
    zeros,
)

_STAGES = 2  # chunks in shared memory: this one and the next
_GROUP = 4  # tokens whose states are in registers at once


def backward(x, delta, A, B, C, D, gate, delta_bias, starts, states, d_y, d_final, *, interpret):
    """Run the backward pass.

    Args:
        x, delta, A, B, C, D, gate, delta_bias, starts: as `forward` takes them.
        states: what it saved.
        d_y: [B, T, D], the gradient of y.
        d_final: [B, D, STATES] float32, the gradient of the final state.
        interpret: run in the interpreter.

    Returns:
        The gradients by name: of x, delta, gate in their dtypes; of A, B, C, D, delta_bias, initial_state in float32.
    """
    batch, time, channels = x.shape
    chunks, blocks, groups = time // CHUNK, channels // WIDTH, CHUNK // _GROUP
    by_token = {"x": x, "delta": delta, "gate": gate, "d_y": d_y}
    tiles = {name: by_warp(array) for name, array in by_token.items() if array is not None}
    of_channel = {"D": D, "delta_bias": delta_bias}
    of_channel = {name: by_warp(array) for name, array in of_channel.items() if array is not None}
    inputs = tiles | of_channel | {"rows": rows(B, C, starts), "A": by_warp_state(A * LOG2_E)}
    inputs |= {"states": by_warp_state(states), "d_final": by_warp_state(d_final)}
    results: list[str] = [name for name in ("x", "delta", "gate") if name in tiles]
    outputs: dict[str, jax.ShapeDtypeStruct] = {
        name: jax.ShapeDtypeStruct(tiles[name].shape, tiles[name].dtype) for name in results
    }
    outputs |= {
        name: jax.ShapeDtypeStruct((batch, channels // LANES, LANES, STATES), F32) for name in ("A", "initial_state")
    }
    outputs |= {name: jax.ShapeDtypeStruct((batch, SLICE, channels // LANES, LANES), F32) for name in of_channel}
    outputs["rows"] = jax.ShapeDtypeStruct((batch, blocks, time, 2, STATES), F32)

    def body(*refs, loaded, **smem):
        hbm = dict(zip(inputs, refs, strict=False))
        gradients = dict(zip(outputs, refs[len(inputs) :], strict=True))
        block, row = lax.axis_index("channels"), lax.axis_index("row")
        mine = pl.ds(4 * block, 4)
        constant = {name: load(hbm[name].at[mine], TOKENS.reduce(0)) for name in of_channel}

        def fetch(step):
            n, slot = chunks - 1 - step, lax.rem(step, _STAGES)
            tokens = pl.ds(n * CHUNK, CHUNK)
            for name in tiles:
                plgpu.copy_gmem_to_smem(hbm[name].at[row, tokens, mine], smem[name].at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(hbm["rows"].at[row, tokens], smem["rows"].at[slot], loaded.at[slot])
            plgpu.copy_gmem_to_smem(hbm["states"].at[row, n, mine], smem["states"].at[slot], loaded.at[slot])

        def walk(step, carry):
            d_state, d_A, sums = carry
            sums = dict(zip(of_channel, sums, strict=True))
            n, slot = chunks - 1 - step, lax.rem(step, _STAGES)
            tile = {name: smem[name].at[slot] for name in tiles}
            shared = smem["rows"].at[slot]
            plgpu.barrier_wait(loaded.at[slot])

            for first in range(0, CHUNK, SLICE):
                size, inner, d_inner = (load_tokens(tile[name], first) for name in ("delta", "x", "d_y"))
                if delta_bias is not None:
                    size = softplus(size + along_tokens(constant["delta_bias"]))
                if gate is not None:
                    z = load_tokens(tile["gate"], first)
                    d_inner = d_inner * (z * sigmoid(z))
                if D is not None:
                    sums["D"] = sums["D"] + d_inner * inner
                for name, value in {"size": size, "written": size * inner, "wanted": d_inner}.items():
                    store(smem[name].at[pl.ds(first, SLICE)], value)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before, whose slot is free from here on
            plgpu.commit_smem()

            @pl.when(step + 1 < chunks)
            def _():
                fetch(step + 1)

            def place(group):  # of the state before it
                return jnp.where(group == 0, slot, _STAGES - 1 + group)

            def state_before(group):
                return load(smem["states"].at[place(group)], STATE).astype(F32)

            def advance(t, state):
                decay = jnp.exp2(along_states(load(smem["size"].at[t], OF_CHANNEL)) * A_log2)
                if starts is not None:
                    decay = decay * along_channels(load(shared.at[t, 2], OF_STATE))
                write = along_states(load(smem["written"].at[t], OF_CHANNEL))
                return decay, decay * state + write * along_channels(load(shared.at[t, 0], OF_STATE))

            def operands(t):
                of_channels = (load(smem[name].at[t], OF_CHANNEL) for name in ("size", "written", "wanted"))
                return *of_channels, *(load(shared.at[t, i], OF_STATE) for i in range(2))

            def first_pass(group, state):
                before = state
                for k in range(_GROUP):
                    _, state = advance(group * _GROUP + k, state)
                store(smem["states"].at[place(group)], before.astype(x.dtype))
                return state

            def second_pass(i, carry):
                d_state, d_A = carry
                group = groups - 1 - i
                after, kept = state_before(group), []
                for k in range(_GROUP):
                    before = after
                    decay, after = advance(group * _GROUP + k, before)
                    kept.append((decay, before, after))
                # Reads come first and writes last: the compiler cannot tell buffers apart, and a read that follows a
                # write waits for all that is written.
                following = operands(group * _GROUP + _GROUP - 1)
                for k in reversed(range(_GROUP)):
                    t = group * _GROUP + k
                    decay, before, after = kept[k]
                    size, written, wanted, B_t, C_t = following
                    if k > 0:
                        following = operands(t - 1)
                    d_state = d_state + along_states(wanted) * along_channels(C_t)
                    writes, reads = d_state * along_states(written), after * along_states(wanted)
                    d_written = read(d_state, B_t, interpret=interpret)
                    y = None if gate is None else read(after, C_t, interpret=interpret)
                    d_state = d_state * decay
                    d_log_decay = d_state * before
                    d_A = d_A + d_log_decay * along_states(size)
                    d_log2_decay = read_each(d_log_decay, A_log2, interpret=interpret)
                    sum_channels(smem["sums"].at[:, t], writes, reads, interpret=interpret)
                    store(smem["written"].at[t], d_written)
                    store(smem["wanted"].at[t], d_log2_decay)
                    if gate is not None:
                        store(smem["read"].at[t], y)
                return d_state, d_A

            before_last = lax.fori_loop(0, groups - 1, first_pass, state_before(0))
            store(smem["states"].at[place(groups - 1)], before_last.astype(x.dtype))
            d_state, d_A = lax.fori_loop(0, groups, second_pass, (d_state, d_A))
            plgpu.commit_smem()

            # Now "written" and "wanted" hold their own gradients; those of the tiles take the tiles' place.
            for first in range(0, CHUNK, SLICE):
                tokens = pl.ds(first, SLICE)
                inner, d_outer = (load_tokens(tile[name], first) for name in ("x", "d_y"))
                d_written, d_log2_decay, size = (load_tokens(smem[k], first) for k in ("written", "wanted", "size"))
                d_size, d_inner = d_log2_decay * (1 / LOG2_E) + d_written * inner, d_outer
                if delta_bias is not None:
                    logit = load_tokens(tile["delta"], first) + along_tokens(constant["delta_bias"])
                    d_size = d_size * sigmoid(logit)
                    sums["delta_bias"] = sums["delta_bias"] + d_size
                store(tile["delta"].at[tokens], d_size.astype(delta.dtype))
                if gate is not None:
                    z = load_tokens(tile["gate"], first)
                    open_part = sigmoid(z)
                    y = load_tokens(smem["read"], first)
                    if D is not None:
                        y = y + along_tokens(constant["D"]) * inner
                    d_gate = d_outer * y * (open_part * (1.0 + z * (1.0 - open_part)))
                    store(tile["gate"].at[tokens], d_gate.astype(gate.dtype))
                    d_inner = d_outer * (z * open_part)
                d_x = d_written * size
                if D is not None:
                    d_x = d_x + along_tokens(constant["D"]) * d_inner
                store(tile["x"].at[tokens], d_x.astype(x.dtype))
            flat = plgpu.Layout.WG_STRIDED((CHUNK, 2, STATES), vec_size=4)
            of_warp = [load(smem["sums"].at[warp], flat) for warp in range(4)]
            store(smem["sums"].at[0], (of_warp[0] + of_warp[1]) + (of_warp[2] + of_warp[3]))
            plgpu.commit_smem()
            tokens = pl.ds(n * CHUNK, CHUNK)
            for name in results:
                plgpu.copy_smem_to_gmem(tile[name], gradients[name].at[row, tokens, mine])
            plgpu.copy_smem_to_gmem(smem["sums"].at[0], gradients["rows"].at[row, block, tokens])
            return d_state, d_A, tuple(sums.values())

        fetch(0)
        A_log2 = load(hbm["A"].at[mine], STATE)
        nothing = tuple(zeros((SLICE, 4, LANES), TOKENS) for _ in of_channel)
        # The sum, unlike what is read, has the type of a loop's carry inside shard_map.
        carry = load(hbm["d_final"].at[row, mine], STATE) + zeros(ALL, STATE), zeros(ALL, STATE), nothing
        d_initial, d_A, sums = lax.fori_loop(0, chunks, walk, carry)
        store(gradients["initial_state"].at[row, mine], d_initial)
        store(gradients["A"].at[row, mine], d_A)
        for name, value in zip(of_channel, sums, strict=True):
            store(gradients[name].at[row, :, mine], value)
        plgpu.wait_smem_to_gmem(0)

    tile = (CHUNK, 4, LANES)
    scratch: dict[str, Any] = {name: plgpu.SMEM((_STAGES, *tile), array.dtype) for name, array in tiles.items()}
    scratch["rows"] = plgpu.SMEM((_STAGES, CHUNK, *inputs["rows"].shape[2:]), F32)
    scratch["states"] = plgpu.SMEM((_STAGES + groups - 1, *ALL), x.dtype)
    scratch["sums"] = plgpu.SMEM((4, CHUNK, 2, STATES), F32)
    values = ("size", "written", "wanted") + (() if gate is None else ("read",))
    scratch |= {name: plgpu.SMEM(tile, F32) for name in values}
    scratch["loaded"] = plgpu.Barrier(num_arrivals=len(tiles) + 2, num_barriers=_STAGES)
    run = kernel(
        body,
        grid=(blocks, batch),
        name="mamba_backward",
        interpret=interpret,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
    )
    parts = dict(zip(outputs, run(*inputs.values()), strict=True))
    gradients: dict[str, jax.Array] = {name: parts[name].reshape(x.shape) for name in results}
    gradients["A"] = jnp.sum(parts["A"], axis=0).reshape(A.shape)
    gradients["initial_state"] = parts["initial_state"].reshape(batch, channels, STATES)
    gradients |= {name: jnp.sum(parts[name], axis=(0, 1)).reshape(channels) for name in of_channel}
    sums = jnp.sum(parts["rows"], axis=1)
    return gradients | {"B": sums[:, :, 0], "C": sums[:, :, 1]}
