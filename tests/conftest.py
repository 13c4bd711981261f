"""Eight simulated CPU devices, so that every test may lay arrays out on a mesh, and programs compiled in a hurry."""

import os

import jax

# The Pallas interpreters wait inside callbacks, and starve on a machine with fewer cores than warpgroups that wait.
os.environ.setdefault("NPROC", "8")
jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of what the tests do. Commands that they start in other processes are compiled as for a user.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
