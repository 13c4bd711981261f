"""Eight simulated CPU devices, so that every test may lay arrays out on a mesh."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
