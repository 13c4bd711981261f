"""What a backward pass does again instead of remembering it."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.target import target

recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
"""Wrap an elementwise function so that its gradient keeps the arguments and nothing in between.

Between two matrix products a layer has some ten elementwise steps. To redo them is nearly free; to store what each of
them needs, float32 copies among it, takes most of the memory and bandwidth of a layer.
"""


def recomputed_afresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do the same, on GPUs behind a barrier, so that XLA cannot share any step with the forward pass.

    Sharing is right for what the forward pass has at hand anyway. But of a function of several arguments XLA then makes
    each gradient in a pass of its own, which reads all arguments again, or keeps a float32 step of the forward pass in
    memory. On TPUs, which make such gradients together with the product before them, a barrier would cost a pass.
    """
    return jax.checkpoint(function, prevent_cse=target().platform == "gpu")
