"""Mamba's selective scan on Hopper in Pallas Mosaic GPU: bfloat16 or float32, up to 16 numbers a state, any length.

This file makes the kernels one differentiable op: it pads states and rows to what the kernels take, cuts rows into
parts where there are too few to fill the device, and sums the gradients of what rows share.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.segments import segment_starts
from pallas_kernels.selective_scan.mosaic_gpu_backward import backward
from pallas_kernels.selective_scan.mosaic_gpu_carry import wanted, written
from pallas_kernels.selective_scan.mosaic_gpu_forward import forward
from pallas_kernels.selective_scan.mosaic_gpu_tile import CHUNK, STATES, WIDTH
from pallas_kernels.target import not_hopper

_NO_STEP = -1e4  # softplus of it is 0
_ENOUGH_BLOCKS = 256  # two for each multiprocessor of an H100, which has 132
_LEAST_PART = 256  # tokens
_MOST_ROWS = 65_535  # a grid's second axis


def unsupported(*, x, delta, A, gate, chunk_size, interpret, **others):
    """Return why the Hopper kernels do not serve the call, or None; see `api.py`."""
    for name, array in (("x", x), ("delta", delta), ("gate", gate)):
        if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"{name} is {array.dtype}; the kernels take bfloat16 or float32."
    if A.shape[1] > STATES:
        return f"a state has {A.shape[1]} numbers; the kernels take at most {STATES}."
    if x.shape[2] % WIDTH:
        return f"there are {x.shape[2]} channels; the kernels take multiples of {WIDTH}."
    if chunk_size not in (None, CHUNK):
        return f"chunk_size is {chunk_size}; the kernels walk chunks of {CHUNK}."
    if x.shape[0] * _parts(x) > _MOST_ROWS:
        return f"there are {x.shape[0]} rows; a grid has room for {_MOST_ROWS}."
    return None if interpret else not_hopper()


def selective_scan(*, x, delta, A, B, C, D, gate, delta_bias, initial_state, segment_ids, chunk_size, interpret):
    """Compute the op on a Hopper GPU; see `api.py`."""
    time, size = x.shape[1], A.shape[1]
    parts = _parts(x)
    tail = -time % (CHUNK * parts)
    starts = None
    if segment_ids is not None:
        starts = jnp.pad(segment_starts(segment_ids), ((0, 0), (0, tail)))

    def pad(array, value=0.0):
        return None if array is None else jnp.pad(array, ((0, 0), (0, tail), (0, 0)), constant_values=value)

    def pad_state(array):
        return None if array is None else jnp.pad(array, ((0, 0),) * (array.ndim - 1) + ((0, STATES - size),))

    wide = lambda array: None if array is None else array.astype(jnp.float32)
    delta = pad(delta, 0.0 if delta_bias is None else _NO_STEP)
    A, B, C = pad_state(wide(A)), pad(pad_state(B)), pad(pad_state(C))
    arrays = (pad(x), delta, A, B, C, wide(D), pad(gate), wide(delta_bias), pad_state(initial_state), starts)
    y, state = _SCAN[interpret](*arrays, parts, interpret)
    return y[:, :time], state[..., :size]


def _parts(x):
    """Return into how many parts a row is cut."""
    batch, time, channels = x.shape
    parts = 1
    while 2 * parts * batch * (channels // WIDTH) <= _ENOUGH_BLOCKS and time >= 2 * parts * _LEAST_PART:
        parts *= 2
    return parts


def _cut(array, parts):
    """Cut rows [B, T, ...] into parts [B parts, T / parts, ...]."""
    if array is None or parts == 1:
        return array
    return array.reshape(array.shape[0] * parts, array.shape[1] // parts, *array.shape[2:])


def _run(x, delta, A, B, C, D, gate, delta_bias, initial_state, starts, parts, interpret, *, save):
    """Return y, the final state, and what the backward pass needs: states, and the decays of the parts, if any."""
    batch, channels = x.shape[0], x.shape[2]
    tokens = {"x": x, "delta": delta, "B": B, "C": C, "gate": gate, "starts": starts}
    tokens = {name: _cut(array, parts) for name, array in tokens.items()}
    decays = None
    if parts > 1:
        of_writes = (tokens["x"], tokens["delta"], A, tokens["B"], delta_bias, tokens["starts"])
        changes, decays = (
            array.reshape(batch, parts, channels, STATES) for array in written(*of_writes, interpret=interpret)
        )
        before = [jnp.zeros_like(changes[:, 0]) if initial_state is None else initial_state]
        for part in range(parts - 1):
            before.append(decays[:, part] * before[-1] + changes[:, part])
        initial_state = jnp.stack(before, axis=1).reshape(batch * parts, channels, STATES)
    y, final, *states = forward(
        **tokens, A=A, D=D, delta_bias=delta_bias, initial_state=initial_state, save=save, interpret=interpret
    )
    final = final.reshape(batch, parts, channels, STATES)[:, -1]
    return y.reshape(x.shape), final, (*states, decays)


def _scan(x, delta, A, B, C, D, gate, delta_bias, initial_state, starts, parts, interpret):
    arrays = (x, delta, A, B, C, D, gate, delta_bias, initial_state, starts)
    return _run(*arrays, parts, interpret, save=False)[:2]


def _scan_forward(x, delta, A, B, C, D, gate, delta_bias, initial_state, starts, parts, interpret):
    arrays = (x, delta, A, B, C, D, gate, delta_bias, initial_state, starts)
    y, final, saved = _run(*arrays, parts, interpret, save=True)
    there = None if initial_state is None else ()
    return (y, final), (x, delta, A, B, C, D, gate, delta_bias, there, starts, saved)


def _scan_backward(parts, interpret, residuals, gradients):
    x, delta, A, B, C, D, gate, delta_bias, initial_state, starts, (states, decays) = residuals
    d_y, d_final = gradients
    batch, channels = x.shape[0], x.shape[2]
    tokens = {"x": x, "delta": delta, "B": B, "C": C, "gate": gate, "starts": starts, "d_y": d_y}
    tokens = {name: _cut(array, parts) for name, array in tokens.items()}
    if parts > 1:
        of_reads = (tokens["d_y"], tokens["gate"], tokens["delta"], A, tokens["C"], delta_bias, tokens["starts"])
        changes = wanted(*of_reads, interpret=interpret).reshape(batch, parts, channels, STATES)
        after = [d_final]
        for part in reversed(range(1, parts)):
            after.append(decays[:, part] * after[-1] + changes[:, part])
        d_final = jnp.stack(after[::-1], axis=1).reshape(batch * parts, channels, STATES)
    d = backward(**tokens, A=A, D=D, delta_bias=delta_bias, states=states, d_final=d_final, interpret=interpret)
    whole = lambda name, like: None if like is None else d[name].reshape(like.shape).astype(like.dtype)
    d_initial = None
    if initial_state is not None:
        d_initial = d["initial_state"].reshape(batch, parts, channels, STATES)[:, 0]
    arrays = {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "gate": gate, "delta_bias": delta_bias}
    return *(whole(name, like) for name, like in arrays.items()), d_initial, None


def _differentiable(interpret):
    """Give the forward pass its gradient; under `jax.checkpoint` its first run then saves nothing for it."""
    scan = jax.custom_vjp(_scan, nondiff_argnums=(10, 11))
    lean = not interpret  # whose effects stand in the way
    scan.defvjp(_scan_forward, _scan_backward, optimize_remat=lean)
    return scan


_SCAN = {interpret: _differentiable(interpret) for interpret in (False, True)}
