"""What the ops' doors share: which implementation serves a call, and arguments that vary alike."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax


def choose(
    op: str,
    implementation: str | Sequence[str] | None,
    implementations: Sequence[str],
    best_first: Sequence[str],
    unsupported: Callable[[str], str | None],
) -> str:
    """Return the name of the first implementation that serves a call.

    Args:
        op: what is called, for messages.
        implementation: the caller's wish: a name, several in the order to try, or None for `best_first`, in which case
            a warning says once what was passed over.
        implementations: the names there are.
        best_first: those that None tries.
        unsupported: returns the reason why a name does not serve the call, one sentence, or None.

    Raises:
        ValueError: the wish names none, or one that there is not.
        NotImplementedError: none of them serves; the message has every reason.
    """
    names = best_first if implementation is None else implementation
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names or any(name not in implementations for name in names):
        raise ValueError(
            f"implementation is {implementation!r}; it must be None, one of {', '.join(implementations)}, "
            "or a sequence of them."
        )
    reasons: dict[str, str] = {}
    for name in names:
        reason = unsupported(name)
        if reason is None:
            break
        reasons[name] = reason
    else:
        tried = "; nor by ".join(f"{name!r}: {reason.rstrip('.')}" for name, reason in reasons.items())
        raise NotImplementedError(f"{op} is not served by {tried}.")
    if implementation is None:
        for passed_over, reason in reasons.items():
            say_once(f"{op} runs as {name!r} and not as {passed_over!r}: {reason}")
    return name


@functools.cache
def say_once(message: str) -> None:
    """Log a warning, the first time in this process."""
    logging.getLogger(__name__).warning(message)


def vary_alike(arrays: Any) -> Any:
    """Make all arrays vary over the same manual axes of an enclosing `shard_map`, as custom gradients and kernels need.

    The transpose of this cast is the sum over the axes that an array did not vary over: the gradient of a gate that all
    devices share, say. Outside `shard_map`, and with check_vma=False, nothing happens.
    """
    axes = lambda x: jax.typeof(x).manual_axis_type.varying
    union = frozenset().union(*map(axes, jax.tree.leaves(arrays)))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(sorted(union - axes(x))), to="varying"), arrays)
