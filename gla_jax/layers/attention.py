"""Causal softmax attention with rotary positions: the mixer of Transformer++, that is LLaMA (arXiv 2302.13971)."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from gla_jax.config import ConfigError
from gla_jax.layers import splash_attention
from gla_jax.layers.check import check_divides, check_one_of
from gla_jax.layers.linear import linear, linear_flops
from gla_jax.layers.rotary import continue_positions, rotate
from gla_jax.parallel import sequence
from gla_jax.parallel.sharding import axis_size, out_sharding, per_shard, share, zeros
from pallas_kernels.dispatch import say_once
from pallas_kernels.target import target

State = dict[str, jax.Array]

# Plain XLA holds the scores of so many queries at a time: all keys for each, so memory grows with T and not with T^2.
_QUERIES_AT_A_TIME = 512
# cuDNN takes the borders of documents as a [T, T] array per row; above this size in all, plain XLA does without.
_MOST_MASK_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What an attention layer has beyond its size."""

    num_kv_heads: int | None = None
    """Heads of key and value, each shared by as many query heads; None: as many as query heads."""
    qkv_bias: bool = False
    """Add a bias to query, key and value."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies."""
    window: int | None = None
    """A token sees so many tokens, itself included; None: all before it."""
    cache_length: int = 2048
    """Tokens that a state has room for, padding included; not used with a window, whose size is enough."""
    implementation: str | None = None
    """How a call without a state computes: "cudnn", flash attention on GPUs; "splash", flash attention on TPUs; or
    "xla", as all other calls do. None: the devices' flash attention where it serves, else XLA."""


class Attention(nnx.Module):
    """Softmax attention over all earlier tokens of the document.

        q, k, v = rotate(Wq x), rotate(Wk x), Wv x
        o_t = sum_{s <= t} softmax_s(K^-0.5 q_t k_s) v_s        y = Wo o

    Its state is a cache of `cache_length` keys and values (a ring of `window` of them, if there is a window), of which
    those of the last token's document are kept. Without a window, a state that has been given more tokens than it has
    room for makes every later output NaN: what was lost would be missed silently otherwise. A call without a state may
    be of any length.

    Args:
        hidden_size: model dimension D.
        num_heads: query heads H.
        options: everything else; see `Attention.Options`.
        norm_eps: not used.
        initializer_range: standard deviation of all weights.
        dtype: compute dtype.
        param_dtype: dtype that parameters are held in.
        rngs: source of randomness.

    Raises:
        ConfigError: sizes that do not divide, or an unknown name.
    """

    Options = AttentionOptions

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        options: AttentionOptions = AttentionOptions(),
        *,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.check(hidden_size, num_heads, options)
        self.options, self.dtype = options, dtype
        self.num_heads, self.num_kv_heads = num_heads, options.num_kv_heads or num_heads
        self.head_size = hidden_size // num_heads  # K
        keys = self.num_kv_heads * self.head_size

        weights = functools.partial(
            linear, initializer_range=initializer_range, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.query = weights(hidden_size, hidden_size, ("embed", "heads"), use_bias=options.qkv_bias)
        self.key = weights(hidden_size, keys, ("embed", "heads"), use_bias=options.qkv_bias)
        self.value = weights(hidden_size, keys, ("embed", "heads"), use_bias=options.qkv_bias)
        self.output = weights(hidden_size, hidden_size, ("heads", "embed"))

    def __call__(
        self,
        x: jax.Array,
        state: State | None = None,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, State]:
        """Mix x [B, T, D] along time.

        Args:
            x: inputs, any T >= 1.
            state: what an earlier call or `init_state` returned; None: nothing came before.
            segment_ids: [B, T] int32; see `gla_jax.layers`.
            positions: [B, T] int32, for the rotation; None: counted on from the state.

        Returns:
            y [B, T, D] in the compute dtype, and the state after the last token.

        Raises:
            ValueError: the state has not enough room for the tokens, as far as that can be seen while tracing.
        """
        self._check_room(x.shape[1], state)
        x = share(x, "heads", "batch", "time", None)
        wide = out_sharding("batch", "time", "heads")
        heads = lambda projected: projected.reshape(*x.shape[:2], -1, self.head_size)
        query, key, value = (heads(layer(x, out_sharding=wide)) for layer in (self.query, self.key, self.value))
        rows, row, states = ("batch", "time", "heads", None), ("batch", "time"), self._state_axes()
        past = (None,) * len(states) if state is None else tuple(state[name] for name in states)
        axes = (rows, rows, rows, row, row, *states.values())
        out, state = per_shard(self._attend, axes, (rows, states))(query, key, value, segment_ids, positions, *past)
        return self.output(out.reshape(*x.shape[:2], -1), out_sharding=out_sharding("batch", "time", "hidden")), state

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        *past: jax.Array | None,
    ) -> tuple[jax.Array, State]:
        """Attend within one device's rows and heads; `past` are the arrays of the state, or Nones.

        Where rows are cut along time, each device attends from its own tokens to whole rows of keys and values.
        """
        given = {name: array for name, array in zip(self._state_axes(), past, strict=True) if array is not None}
        state = given or None
        positions, next_position = continue_positions(query, positions, None if state is None else state["position"])
        query = rotate(query, positions, self.options.rotary_base)
        key = sequence.gather_parts(rotate(key, positions, self.options.rotary_base))
        value = sequence.gather_parts(value)
        batch_size, length = value.shape[:2]

        # Tokens are numbered from 1 in the order of their coming; documents from 0, which is that of the state.
        before = jnp.zeros(batch_size, jnp.int32) if state is None else state["length"]
        order = before[:, None] + jnp.arange(1, length + 1, dtype=jnp.int32)
        document = jnp.zeros_like(order)
        if segment_ids is not None:
            segment_ids = sequence.gather_parts(segment_ids)
            borders = jnp.cumsum(segment_ids[:, 1:] != segment_ids[:, :-1], axis=1, dtype=jnp.int32)
            document = jnp.pad(borders, ((0, 0), (1, 0)))
        cache = self._empty_cache(batch_size, key) if state is None else state
        remembered = self._remember(cache, key, value, order, document)
        new_state = remembered | {"length": order[:, -1], "position": next_position}

        if state is None:
            return self._attend_to_self(query, key, value, order, document, segment_ids is not None), new_state
        new = {"key": key, "value": value, "order": order}
        if length == 1:  # the cache has room for the token and all that it sees
            keys, key_document = remembered, jnp.zeros_like(remembered["order"])
        else:
            keys = {name: jnp.concatenate([cache[name], x], axis=1) for name, x in new.items()}
            key_document = jnp.concatenate([jnp.zeros_like(cache["order"]), document], axis=1)
        order, document = sequence.own_part(order), sequence.own_part(document)
        seen = _Seen(order, document, keys["order"], key_document, self.options.window)
        out = _attend_xla(query, keys["key"], keys["value"], seen)
        if self.options.window is None:
            overflowed = order > self._room
            out = jnp.where(overflowed[:, :, None, None], jnp.nan, out)
        return out, new_state

    def _attend_to_self(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        order: jax.Array,
        document: jax.Array,
        has_documents: bool,
    ) -> jax.Array:
        """Attend to the tokens of this call alone."""
        is_whole = query.shape[1] == key.shape[1]
        needs_mask = has_documents or not is_whole
        window = self.options.window
        seen = _Seen(sequence.own_part(order), sequence.own_part(document), order, document, window)
        implementation = _choose(self.options.implementation, query, key, needs_mask)
        if implementation == "xla":
            return _attend_xla(query, key, value, seen)
        if implementation == "splash":
            documents = (seen.document, seen.key_document) if has_documents else (None, None)
            return splash_attention.splash_attention(query, key, value, *documents, window=window)
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=seen.mask() if needs_mask else None,
            is_causal=is_whole,
            local_window_size=(window - 1, 0) if is_whole and window is not None else None,
            implementation="cudnn",
        )

    def _remember(self, cache: State, key: jax.Array, value: jax.Array, order: jax.Array, document: jax.Array) -> State:
        """Write the newest tokens into the cache; forget all that is not of the last token's document."""
        kept = min(order.shape[1], self._room)
        key, value, order, document = (x[:, -kept:] for x in (key, value, order, document))
        current = document[:, -1:]
        rows, slots = jnp.arange(len(order))[:, None], (order - 1) % self._room
        old = jnp.where(current == 0, cache["order"], 0)
        return {
            "key": cache["key"].at[rows, slots].set(key.astype(cache["key"].dtype)),
            "value": cache["value"].at[rows, slots].set(value.astype(cache["value"].dtype)),
            "order": old.at[rows, slots].set(jnp.where(document == current, order, 0)),
        }

    def _empty_cache(self, batch_size: int, key: jax.Array) -> State:
        entries = jnp.zeros((batch_size, self._room, *key.shape[2:]), self.dtype)
        return {"key": entries, "value": entries, "order": jnp.zeros((batch_size, self._room), jnp.int32)}

    @property
    def _room(self) -> int:
        """Slots of the cache."""
        return self.options.window or self.options.cache_length

    def _check_room(self, length: int, state: State | None) -> None:
        if state is None or self.options.window is not None:
            return
        before = 0 if isinstance(state["length"], jax.core.Tracer) else int(jnp.max(state["length"]))
        if before + length > self._room:
            raise ValueError(
                f"{length} tokens after {before} do not fit into an attention state of "
                f"model.mixers.attention.cache_length={self._room}; raise it to {before + length} or more."
            )

    @staticmethod
    def _state_axes() -> dict[str, tuple[str | None, ...]]:
        cache = ("batch", None, "heads", None)
        return {"key": cache, "value": cache, "order": ("batch", None), "length": ("batch",), "position": ("batch",)}

    def init_state(self, batch_size: int) -> State:
        """Return the state before the first token: all zeros.

        "key" and "value" [B, room, H_kv, K] in the compute dtype; "order" [B, room] int32, the number, from 1, of the
        token in each slot, 0 where there is none; "length" [B] int32, tokens so far; "position" [B] int32, the next.
        """
        shape = (batch_size, self._room, self.num_kv_heads, self.head_size)  # of keys and values; the rest have less
        dtype = lambda axes: self.dtype if len(axes) == 4 else jnp.int32
        return {name: zeros(shape[: len(axes)], dtype(axes), *axes) for name, axes in self._state_axes().items()}

    def flops_per_token(self, context_length: int) -> float:
        """Return the FLOPs of the forward pass for one token, on average over a row of `context_length` tokens.

        Every linear map, and 4 K per head for each token that is seen: for its score and its value.
        """
        window = min(self.options.window or context_length, context_length)
        seen = window - window * (window - 1) / (2 * context_length)  # the mean of min(t, window), t = 1 .. T
        maps = (self.query, self.key, self.value, self.output)
        return linear_flops(*maps) + 4.0 * self.num_heads * self.head_size * seen

    @staticmethod
    def check(hidden_size: int, num_heads: int, options: AttentionOptions) -> None:
        """Raise ConfigError, in one sentence, if no layer can be made of these on the current mesh."""
        section = "model.mixers.attention"
        check_divides("model.num_heads", num_heads, "model.hidden_size", hidden_size)
        if hidden_size // num_heads % 2:
            raise ConfigError(
                f"model.num_heads={num_heads} makes heads of {hidden_size // num_heads} channels, which rotary "
                "positions turn in pairs; choose one that makes their number even."
            )
        kv_heads, kv_name = num_heads, "model.num_heads"
        if options.num_kv_heads is not None:
            kv_heads, kv_name = options.num_kv_heads, f"{section}.num_kv_heads"
            check_divides(kv_name, kv_heads, "model.num_heads", num_heads)
        check_divides("mesh.tensor", axis_size("heads"), kv_name, kv_heads)
        check_one_of(f"{section}.implementation", options.implementation, (None, "cudnn", "splash", "xla"))
        for field in ("window", "cache_length"):
            value = getattr(options, field)
            if value is not None and value < 1:
                raise ConfigError(f"{section}.{field}={value} must be at least 1.")
        if options.rotary_base <= 0:
            raise ConfigError(f"{section}.rotary_base={options.rotary_base} must be above 0.")


def _choose(implementation: str | None, query: jax.Array, key: jax.Array, needs_mask: bool) -> str:
    """Return the implementation that was asked for, or else the best that serves.

    Raises:
        NotImplementedError: "splash" was asked for and does not serve.
    """
    platform = target().platform
    if implementation == "splash" or (implementation is None and platform == "tpu"):
        reason = splash_attention.unsupported(query)
        if reason is None:
            return "splash"
        if implementation == "splash":
            raise NotImplementedError(f"Attention is not served by 'splash': {reason}")
        say_once(f"Attention runs as 'xla' and not as 'splash': {reason}")
    if implementation is None:
        return "cudnn" if platform == "gpu" and _cudnn_serves(query, key, needs_mask) else "xla"
    return implementation


def _cudnn_serves(query: jax.Array, key: jax.Array, needs_mask: bool) -> bool:
    """Say whether cuDNN's flash attention does: in half precision, at sizes that it knows."""
    batch_size, length, _, head_size = query.shape
    mask_bytes = batch_size * length * key.shape[1] * query.dtype.itemsize if needs_mask else 0
    return (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and head_size % 8 == 0
        and head_size <= 128
        and length % 64 == 0
        and mask_bytes <= _MOST_MASK_BYTES
    )


class _Seen(NamedTuple):
    """Which keys a query sees: those that come no later, of the same document, in the window."""

    order: jax.Array
    """[B, T] int32, of the queries."""
    document: jax.Array
    key_order: jax.Array
    """[B, S] int32; 0 marks a key that is none."""
    key_document: jax.Array
    window: int | None

    def mask(self) -> jax.Array:
        """Return [B, 1, T, S] bool."""
        order, document = self.order[:, None, :, None], self.document[:, None, :, None]
        key_order = self.key_order[:, None, None, :]
        seen = (key_order > 0) & (key_order <= order) & (self.key_document[:, None, None, :] == document)
        return seen if self.window is None else seen & (key_order > order - self.window)


def _attend_xla(query: jax.Array, key: jax.Array, value: jax.Array, seen: _Seen) -> jax.Array:
    """Attend from [B, T, H, K] to [B, S, H_kv, K], some hundred queries at a time."""

    def attend(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query, order, document = part
        mask = seen._replace(order=order, document=document).mask()
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")

    length = query.shape[1]
    if length <= 2 * _QUERIES_AT_A_TIME:
        return attend((query, seen.order, seen.document))

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ..] to [parts, B, queries, ..]
        x = jnp.pad(x, ((0, 0), (0, -length % _QUERIES_AT_A_TIME)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), -1, _QUERIES_AT_A_TIME, *x.shape[2:]), 1, 0)

    # The backward pass makes the scores of each part again instead of keeping those of all.
    out = jax.lax.map(jax.checkpoint(attend), (cut(query), cut(seen.order), cut(seen.document)))
    return jnp.moveaxis(out, 0, 1).reshape(len(query), -1, *query.shape[2:])[:, :length]
