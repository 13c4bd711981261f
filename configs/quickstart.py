"""The King James Bible, byte by byte, on a laptop's CPU.

python train.py --config=configs/quickstart.py --workdir=/tmp/gla-quickstart
"""

from gla_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 340

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
