"""The King James Bible, byte by byte, on a laptop's CPU.

Command    python train.py --config=configs/quickstart.py --workdir=/tmp/gla-quickstart
Hardware   two CPU cores, 1 GB of memory
Time       2.7 minutes, the first loss after 11 seconds
Expect     2.17 bits per byte on the held-out books (xz -9e takes 2.26), and samples that sound like scripture
"""

from gla_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 600

    config.model.hidden_size = 128
    config.model.num_layers = 4
    config.model.num_heads = 2
    config.model.intermediate_size = 384

    config.data.sequence_length = 256
    config.data.batch_size = 8

    config.optimizer.learning_rate = 4e-3
    config.optimizer.final_learning_rate = 4e-4
    config.optimizer.warmup_steps = 50

    config.eval.every = 100
    config.checkpoint.every = 100
    config.sample.prompt = "In the beginning"
    config.sample.tokens = 200
    config.dtype.compute = "float32"  # CPUs have no bfloat16 units
    return config
