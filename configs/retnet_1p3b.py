"""RetNet with SwiGLU, 1351.7M parameters, a baseline of the GLA paper (arXiv 2312.06635, section 5.1).

24 layers of 8 D^2 for retention (keys of the model's width, values of twice that) and 3 * 2816 D for the SwiGLU,
D = 2048, norms, and 32000 D each for embedding and head. The paper does not name the heads for this size: 8 are as
wide as those of the 340M model.

Command    python -m gla_jax.data.prepare --help        (SlimPajama with Mistral's tokeniser, 32000 tokens)
           python train.py --config=configs/retnet_1p3b.py --workdir=runs/retnet-1p3b \\
               --config.data.path=slimpajama.tokens --config.data.tokenizer=mistral/tokenizer.json
Hardware   32 GPUs of 80 GB. Fewer devices: raise optimizer.accumulation_steps; more: mesh.data=-1, mesh.fsdp=8.
Time       not yet measured
Expect     not yet measured. The paper gives for this size, of its own run: WikiText perplexity 18.64, LAMBADA 17.27.
"""

from gla_jax.config import default_config


def get_config():
    config = default_config()
    config.steps = 47_684  # of 2,097,152 tokens: 100B

    config.model.mixer = "retention"
    config.model.hidden_size = 2048
    config.model.intermediate_size = 2816  # 4/3 D, rounded up to a multiple of 256
    config.model.num_layers = 24
    config.model.num_heads = 8
    config.model.vocab_size = 32_000
    config.model.tie_embeddings = False
    config.model.remat = "full"

    config.data.path = "slimpajama.tokens"
    config.data.tokenizer = "mistral/tokenizer.json"
    config.data.held_out = 0.0002
    config.data.sequence_length = 2048
    config.data.batch_size = 1024

    config.optimizer.learning_rate = 3e-4
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.warmup_steps = 477  # 1B tokens
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every = 1000
    config.eval.every = 1000
    config.eval.batches = 16
    return config
