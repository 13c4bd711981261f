"""The smallest run that has everything in it: evaluations, checkpoints and log lines at steps that do not coincide."""

from gla_jax.config import ConfigDict, default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.steps = 40
    config.model.hidden_size = 16
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.model.intermediate_size = 32
    config.data.corpus = "synthetic"
    config.data.sequence_length = 16
    config.data.batch_size = 8
    config.optimizer.learning_rate = 1e-2
    config.optimizer.final_learning_rate = 1e-3
    config.optimizer.warmup_steps = 5
    config.mesh.fsdp = 1
    config.log.every = 3
    config.eval.every = 8
    config.eval.batches = 2
    config.checkpoint.every = 6
    config.sample.prompt = "1 2"
    config.sample.tokens = 4
    config.dtype.compute = "float32"
    return config
