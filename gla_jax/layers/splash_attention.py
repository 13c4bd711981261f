"""Flash attention on TPUs: JAX's own Pallas kernel, "splash attention", for causal rows, windows and documents.

Blocks of scores that the mask empties are neither computed nor fetched: those above the diagonal and those outside the
window. Query heads share key heads without copies of these, and no array grows with T^2, whatever masks a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from gla_jax.parallel.sharding import shard_count, shard_index
from pallas_kernels.target import target

# Blocks of queries and keys, the largest first, as grid steps cost time: the kernel wants whole ones, of a register's
# 128 lanes or more. 512 is what MaxText trains with; not tuned here.
_BLOCK_SIZES = (512, 256, 128)
# Channels of a head: of these multiples, up to the largest that has been compiled.
_HEAD_MULTIPLE, _LARGEST_HEAD = 64, 256


def unsupported(query: jax.Array, *, interpret: bool = False) -> str | None:
    """Say in one sentence why the kernel does not serve a call, or None if it does.

    Args:
        query: [B, T, H, K], this device's part.
        interpret: whether the call is interpreted, on any backend.
    """
    platform, kind = target()
    length, head_size = query.shape[1], query.shape[3]
    if not interpret and platform != "tpu":
        return f"it would run on {kind}, and needs a TPU; use 'xla'."
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"query is {query.dtype}; it must be bfloat16 or float32."
    if length % _BLOCK_SIZES[-1]:
        return f"a device has {length} tokens of a row; they must be a multiple of {_BLOCK_SIZES[-1]}."
    if head_size % _HEAD_MULTIPLE or head_size > _LARGEST_HEAD:
        return f"heads have {head_size} channels; it must be a multiple of {_HEAD_MULTIPLE}, at most {_LARGEST_HEAD}."
    return None


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    document: jax.Array | None,
    key_document: jax.Array | None,
    *,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """Attend from every token to those no later, of the same document, in the window; inside `per_shard`.

    Args:
        query: [B, T, H, K], this device's part of the rows; `unsupported` says which serve.
        key, value: [B, S, H_kv, K], whole rows: S is T times the parts that rows are cut into.
        document: [B, T] int32, of the queries; None: each row is one.
        key_document: [B, S] int32.
        window: tokens that a query sees, itself included; None: all before it.
        interpret: run in Pallas' interpreter, on any backend.

    Returns:
        [B, T, H, K] in the dtype of query.
    """
    kernel = _kernel(query.shape[1], query.shape[2], key.shape[1], window, interpret)
    by_head = lambda x: jnp.moveaxis(x, 2, 1)
    segments = None
    if document is not None and key_document is not None:
        segments = splash_attention_kernel.SegmentIds(document, key_document)
    query = query * query.shape[-1] ** -0.5  # the kernel does not scale
    return by_head(jax.vmap(kernel)(by_head(query), by_head(key), by_head(value), segments))


def _kernel(length: int, heads: int, key_length: int, window: int | None, interpret: bool) -> Any:
    """Return the function of [H, T, K], [H_kv, S, K], [H_kv, S, K] and segments that one row needs."""
    parts, shape = shard_count("time"), (key_length, key_length)
    if window is None:
        mask: Any = splash_attention_mask.CausalMask(shape)
    else:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    size = next(size for size in _BLOCK_SIZES if length % size == 0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
        ),
        head_shards=1,
        q_seq_shards=parts,
        interpret=interpret,
    )
    # What the kernel knows of the mask is made for whole rows, block by block; a device needs that of its own queries.
    return kernel if parts == 1 else jax.tree.map(lambda x: _own_queries(x, parts), kernel)


def _own_queries(x: jax.Array, parts: int) -> jax.Array:
    """Return this device's part of [S], tokens, or of [1, query blocks, key blocks]."""
    axis = 0 if x.ndim == 1 else 1
    size = x.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(x, shard_index("time") * size, size, axis=axis)
