"""RetNet with SwiGLU, 347.4M parameters, a baseline of the GLA paper (arXiv 2312.06635, section 5.1).

24 layers of 8 D^2 for retention (keys of the model's width, values of twice that) and 3 * 1536 D for the SwiGLU,
D = 1024, which is narrower than GLA's by about what retention is wider; norms; 32000 D for the tied embedding.

Command    python -m gla_jax.data.prepare --help        (SlimPajama with Mistral's tokeniser, 32000 tokens)
           python train.py --config=configs/retnet_340m.py --workdir=runs/retnet-340m \\
               --config.data.path=slimpajama.tokens --config.data.tokenizer=mistral/tokenizer.json
Hardware   8 GPUs of 80 GB. Fewer devices: raise optimizer.accumulation_steps; more: mesh.data=-1, mesh.fsdp=8.
Time       not yet measured
Expect     not yet measured. The paper gives for this size, of its own run: WikiText perplexity 32.33, LAMBADA 49.19.
"""

from gla_jax.config import default_config


def get_config():
    config = default_config()
    config.steps = 28_610  # of 524,288 tokens: 15B

    config.model.mixer = "retention"
    config.model.hidden_size = 1024
    config.model.intermediate_size = 1536  # 4/3 D, rounded up to a multiple of 256
    config.model.num_layers = 24
    config.model.num_heads = 4
    config.model.vocab_size = 32_000
    config.model.tie_embeddings = True
    config.model.remat = "full"

    config.data.path = "slimpajama.tokens"
    config.data.tokenizer = "mistral/tokenizer.json"
    config.data.held_out = 0.001
    config.data.sequence_length = 2048
    config.data.batch_size = 256

    config.optimizer.learning_rate = 3e-4
    config.optimizer.final_learning_rate = 3e-5
    config.optimizer.warmup_steps = 954  # 0.5B tokens
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.checkpoint.every = 1000
    config.eval.every = 1000
    config.eval.batches = 16
    return config
