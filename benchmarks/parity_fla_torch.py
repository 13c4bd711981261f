"""The half of parity_fla.py that needs torch, Triton and fla, and no JAX: a random model of fla, and what it computes.

    python benchmarks/parity_fla_torch.py make FOLDER --layout=340m       writes the model, and what is true of it
    python benchmarks/parity_fla_torch.py measure FOLDER                  how far from that fla is
    python benchmarks/parity_fla_torch.py check FOLDER                    loads a model that gla-jax has exported

`parity_fla.py` calls it. The truth that either library is measured against is the model written out below in plain
PyTorch, in float64. fla runs in bfloat16 in both ways in which it is trained: with its float32 parameters cast to
bfloat16 before use, as FSDP's mixed precision does ("cast"), and under `torch.autocast`, which keeps the sum of the
layers in float32 ("autocast"). Without a GPU it runs in float32, by Triton's interpreter, for rehearsals.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.pop(0)  # or transformers would take kernels.py beside this file for a library of that name

import numpy as np
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

import triton.runtime.autotuner  # noqa: E402  (the variable is read when it is imported)
from safetensors.torch import load_file, save_file  # noqa: E402

COMMON = {"num_heads": 4, "vocab_size": 32_000}
LAYOUTS = {
    "340m": COMMON
    | {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 2816, "tie_word_embeddings": True},
    "1.3b": COMMON | {"num_hidden_layers": 2, "hidden_size": 2048, "intermediate_size": 5632},
    "tiny": {"num_hidden_layers": 2, "num_heads": 2, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48},
}
"""Layers as in fla's GLA-340M (K = 128, V = 256) and GLA-1.3B (K = 256, V = 512), a few of them; one for rehearsals."""
BATCHES = {"340m": (10, 2, 2048), "1.3b": (10, 2, 2048), "tiny": (3, 2, 24)}
"""Steps, rows and tokens of each."""
WAYS = ("cast", "autocast") if torch.cuda.is_available() else ("float32",)
DECODED = 8
ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY, CLIP_NORM = 0.01, 1.0
CHUNK = 64
DEVICE = "cuda" if CUDA else "cpu"


def tune_briefly():
    """Have Triton choose among configurations of four warps and two stages alone: minutes less."""
    initialise = triton.runtime.autotuner.Autotuner.__init__

    def limited(self, fn, arg_names, configs, *others, **named):
        few = [config for config in configs if config.num_warps == 4] or configs[:1]
        few = [config for config in few if config.num_stages == 2] or few
        initialise(self, fn, arg_names, few, *others, **named)

    triton.runtime.autotuner.Autotuner.__init__ = limited


def import_models():
    """Import fla's models; the interpreter cannot time kernels."""
    if not CUDA:
        triton.runtime.autotuner.Autotuner._bench = lambda self, *args, config, **others: [1.0, 1.0, 1.0]
    import fla.models

    return fla.models


def make_model(layout):
    """Return fla's model with every parameter moved away from where it starts."""
    models = import_models()
    torch.manual_seed(0)
    unfused = {} if CUDA else {"fuse_swiglu": False, "fuse_cross_entropy": False}
    config = models.GLAConfig(use_cache=False, **LAYOUTS[layout], **unfused)
    model = models.GLAForCausalLM(config).to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter += scale * torch.randn(parameter.shape, generator=generator, device=DEVICE)
    return model.train()


def load_model(folder):
    """Load a directory of fla's, or one that was exported to it."""
    import_models()
    from transformers import AutoModelForCausalLM

    unfused = {} if CUDA else {"fuse_swiglu": False, "fuse_cross_entropy": False}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **unfused).to(DEVICE)


def draw_batches(layout):
    """Return tokens [steps, rows, length] of which small ones are frequent, as in text."""
    uniform = torch.rand(BATCHES[layout], generator=torch.Generator().manual_seed(1))
    return (LAYOUTS[layout]["vocab_size"] * uniform**3).long().to(DEVICE)


def gla(q, k, v, g):
    """Return the paper's recurrence, equation 3, in chunks, for [B, T, H, K or V] in float64.

    Within a chunk sums of g stay far from where float64 overflows, so none of the care is needed that bfloat16 takes.
    """
    length = q.shape[1]
    pad = -length % CHUNK
    chunks = [F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, CHUNK)).transpose(2, 3).unbind(1) for x in (q, k, v, g)]
    state: torch.Tensor | float = 0.0
    outs: list[torch.Tensor] = []
    for q, k, v, g in zip(*chunks, strict=True):  # [B, H, C, K or V]
        total = g.cumsum(2)
        q, last = q * total.exp(), total[:, :, -1:]
        scores = (q @ (k * (-total).exp()).mT).tril()
        outs.append(scores @ v + q @ state if outs else scores @ v)
        state = last.exp().mT * state + (k * (last - total).exp()).mT @ v
    return torch.stack(outs, dim=1).transpose(2, 3).flatten(1, 2)[:, :length]


def true_logits(params, config, input_ids):
    """Return the logits of fla's GLA with parameters by name, in their precision: the model from its definition."""
    norm = lambda x, scale: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * scale
    x = params["model.embeddings.weight"][input_ids]
    for layer in range(config.num_hidden_layers):
        part = lambda name, layer=layer: params[f"model.layers.{layer}.{name}"]
        heads = lambda x: x.unflatten(-1, (config.num_heads, -1))
        h = norm(x, part("attn_norm.weight"))
        q, k, v, gate = (heads(h @ part(f"attn.{name}_proj.weight").T) for name in "qkvg")
        logits = h @ part("attn.gk_proj.0.weight").T @ part("attn.gk_proj.1.weight").T + part("attn.gk_proj.1.bias")
        out = gla(q * q.shape[-1] ** -0.5, k, v, heads(F.logsigmoid(logits) / 16))
        out = norm(out, part("attn.g_norm_swish_gate.weight")) * F.silu(gate)
        x = x + out.flatten(2) @ part("attn.o_proj.weight").T
        h = norm(x, part("mlp_norm.weight"))
        h = F.silu(h @ part("mlp.gate_proj.weight").T) * (h @ part("mlp.up_proj.weight").T)
        x = x + h @ part("mlp.down_proj.weight").T
    head = params["model.embeddings.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return norm(x, params["model.norm.weight"]) @ head.T


class Truth:
    """The model in float64; called as the others are."""

    def __init__(self, model):
        self.config = model.config
        self.params = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}

    def logits(self, input_ids):
        """Return [B, T, vocab]."""
        return true_logits(self.params, self.config, input_ids)

    def loss(self, input_ids):
        """Return the mean cross-entropy of every token but the first."""
        logits = self.logits(input_ids)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())


class Library:
    """fla's model over its float32 parameters, in bfloat16 as one of the ways to train has it."""

    def __init__(self, model, way):
        self.model, self.way = model, way
        self.params = dict(model.named_parameters())

    def call(self, input_ids, **options):
        """Call the model."""
        if self.way == "float32":
            return self.model(input_ids, **options)
        if self.way == "cast":
            cast = {name: value.bfloat16() for name, value in self.params.items()}
            return torch.func.functional_call(self.model, cast, (input_ids,), options)
        with torch.autocast("cuda", torch.bfloat16):
            return self.model(input_ids, **options)

    def logits(self, input_ids):
        """Return [B, T, vocab]."""
        return self.call(input_ids).logits

    def loss(self, input_ids):
        """Return the mean cross-entropy of every token but the first, by fla's own loss."""
        return self.call(input_ids, labels=input_ids).loss

    def decode(self, input_ids):
        """Return the logits of the last tokens, fed one at a time after the rest."""
        output, steps = self.call(input_ids[:, :-DECODED], use_cache=True), []
        for step in range(-DECODED, 0):
            token = input_ids[:, step].unsqueeze(1)
            output = self.call(token, use_cache=True, past_key_values=output.past_key_values)
            steps.append(output.logits[:, 0])
        return torch.stack(steps, dim=1)


def gradients(model, input_ids):
    """Return the loss and the gradient of every parameter by name."""
    loss = model.loss(input_ids)
    found = torch.autograd.grad(loss, list(model.params.values()))
    return loss.item(), dict(zip(model.params, found, strict=True))


def train(model, batches):
    """Take a step of AdamW for every batch, in place, and return the losses before each."""
    decays = lambda name, value: value.ndim == 2 and "embeddings" not in name
    groups = [
        {
            "params": [value for name, value in model.params.items() if decays(name, value) == flag],
            "weight_decay": decay,
        }
        for flag, decay in ((True, WEIGHT_DECAY), (False, 0.0))
    ]
    optimizer, losses = torch.optim.AdamW(groups, **ADAMW), []
    for batch in batches:
        loss, found = gradients(model, batch)
        for name, value in model.params.items():
            value.grad = found[name].to(value.dtype)
        torch.nn.utils.clip_grad_norm_(model.params.values(), CLIP_NORM)
        optimizer.step()
        losses.append(loss)
    for value in model.params.values():
        value.grad = None
    return losses


def relative(found, truth):
    """Return the root mean square of the difference over that of the truth."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def say(*words):
    """Print at once."""
    print(*words, flush=True)


def make(folder, layout):
    """Write the model, and what is true of it."""
    model = make_model(layout)
    model.save_pretrained(folder)
    batches, truth = draw_batches(layout), Truth(model)
    with torch.no_grad():
        arrays = {"logits": truth.logits(batches[0]).float(), "batches": batches.int()}
    loss, found = gradients(truth, batches[0])
    arrays |= {f"gradient.{name}": value.float() for name, value in found.items()}
    save_file({name: value.contiguous().cpu() for name, value in arrays.items()}, folder / "truth.safetensors")
    losses = train(truth, batches)
    (folder / "truth.json").write_text(json.dumps({"loss": loss, "losses": losses}))
    say("truth", losses)


def measure(folder):
    """Write how far fla is from what is true of the model that `make` wrote."""
    report, truth = {}, load_file(folder / "truth.safetensors", device=DEVICE)
    loss = json.loads((folder / "truth.json").read_text())["loss"]
    batches = truth["batches"].long()
    for way in WAYS:
        library = Library(load_model(folder).train(), way)
        with torch.no_grad():
            found = {"logits": relative(library.logits(batches[0]), truth["logits"])}
            decoded = library.decode(batches[0])
        found["decode"] = [relative(decoded[:, i], truth["logits"][:, i - DECODED]) for i in range(DECODED)]
        value, each = gradients(library, batches[0])
        found["loss"] = abs(value - loss) / loss
        found["gradients"] = {name: relative(each[name], truth[f"gradient.{name}"]) for name in each}
        del each
        found["losses"] = train(library, batches)
        report[way] = found
        worst = sorted(found["gradients"].items(), key=lambda item: -item[1])[:4]
        say(way, found["logits"], found["decode"], worst, found["losses"])
    names = ("torch", "triton", "transformers", "flash-linear-attention")
    versions = {name: importlib.metadata.version(name) for name in names}
    (folder / "fla.json").write_text(json.dumps({"fla": report, "versions": versions}))


def check(folder):
    """Load what was exported, and say how far from the truth of it fla's logits and those of the exporter are."""
    model = load_model(folder).eval()
    theirs = {name: torch.from_numpy(array).to(DEVICE) for name, array in np.load(folder / "logits.npz").items()}
    input_ids = theirs["input_ids"].long()
    with torch.no_grad():
        truth = Truth(model).logits(input_ids)
        found = {way: relative(Library(model, way).logits(input_ids), truth) for way in WAYS}
    found["gla_jax"] = relative(theirs["logits"], truth)
    say("exported", found)
    (folder / "fla.json").write_text(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "measure", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, default="340m")
    parser.add_argument("--briefly", action="store_true", help="tune kernels among few of Triton's choices")
    options = parser.parse_args()
    if options.briefly:
        tune_briefly()
    if options.action == "make":
        make(options.folder, options.layout)
    else:
        {"measure": measure, "check": check}[options.action](options.folder)
