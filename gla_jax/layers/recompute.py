"""What a backward pass does again instead of remembering it."""

import functools

import jax

recomputed = functools.partial(jax.checkpoint, prevent_cse=False)
"""Wrap an elementwise function so that its gradient keeps the arguments and nothing in between.

Between two matrix products a layer has some ten elementwise steps. To redo them is nearly free; to store what each of
them needs, float32 copies among it, takes most of the memory and bandwidth of a layer.
"""

recomputed_afresh = jax.checkpoint
"""Do the same behind a barrier, so that the compiler cannot share any step with the forward pass.

Sharing is right for what the forward pass has at hand anyway. But for one with several arguments XLA then makes each
gradient in a pass of its own, which reads all arguments again, or keeps a float32 step of the forward pass in memory.
"""
