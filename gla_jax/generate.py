"""Sample text from a trained model.

    python -m gla_jax.generate --workdir=DIR --prompt="In the beginning" --prompt="And it came to pass"

DIR is the folder of a run, or a Hugging Face directory.

Every prompt is continued `--samples` times, all in one batch. A text starts like a document of the training data; the
empty prompt, which is the default, lets the model begin one.
"""

from absl import flags

from gla_jax import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run, or a Hugging Face directory.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [""], "Text to continue; repeat the flag to continue several at once.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Continuations of each prompt.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 256, "Tokens to add at the most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Below 1 sharpens, 0 takes the likeliest token.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many of the likeliest tokens only; 0: from all.", lower_bound=0)
_TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "Draw from the likeliest tokens that together have this probability only.",
    lower_bound=1e-9,
    upper_bound=1.0,
)
_SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.")


def main(_: dict[str, str]) -> None:
    """Load the model, continue the prompts, print."""
    # Imported here so that --help and mistakes in flags answer at once.
    from gla_jax.data import load_tokenizer
    from gla_jax.inference import generate
    from gla_jax.loading import load_config, load_model

    tokenizer = load_tokenizer(load_config(_WORKDIR.value).data.tokenizer)
    prompts = [prompt for prompt in _PROMPT.value for _ in range(_SAMPLES.value)]
    continuations = generate(
        load_model(_WORKDIR.value),
        [[tokenizer.end_of_document, *tokenizer.encode(prompt)] for prompt in prompts],
        max_tokens=_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        end_token=tokenizer.end_of_document,
        seed=_SEED.value,
    )
    for index, (prompt, tokens) in enumerate(zip(prompts, continuations, strict=True)):
        if len(prompts) > 1:
            print(f"=== {index + 1} of {len(prompts)} ===")
        print(prompt + tokenizer.decode(tokens), flush=True)


if __name__ == "__main__":
    command_line.run(main)
