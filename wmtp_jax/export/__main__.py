"""Writes a trained model in a published format: python -m wmtp_jax.export --checkpoint=RUN --to=FORMAT --output=DIR

FORMAT  what is written                                              heads that it holds   verified by
hf      the plain transformers architecture with head 0; the heads   any                   transformers
        after it in wmtp_heads.safetensors, described beside it
hf-mtp  that model and its heads for generate(use_mtp=True)          sequential            transformers
medusa  vLLM's Medusa draft model, and the plain model in target/    linear                an independent reader
mimo    a Qwen2 with one MiMo layer for vLLM and SGLang              sequential, one       an independent reader
meta    params.json and consolidated.pth as Meta's release has them  block                 an independent reader

What a format can't express is refused by name. An export is verified before it gets its name: every tensor read again is what
was to be written, bit for bit; all heads' logits on a sample text are the model's own; the tokenizer cuts it alike.
"""

from __future__ import annotations

import os
import tempfile

from absl import flags

from wmtp_jax import cli
from wmtp_jax.data.build import stop_cleanly
from wmtp_jax.export.export import FORMATS, export


def _main() -> None:
    values = flags.FLAGS
    stop_cleanly()
    # Verifying loads the code that comes with an export; its copy goes with this process, and nothing is looked for on a hub.
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_MODULES_CACHE"] = scratch
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # Verification compares float32 with float32: other devices round products otherwise.
        os.environ["JAX_PLATFORMS"] = "cpu"
        export(values.checkpoint, to=values.to, output=values.output, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    flags.DEFINE_string(
        "checkpoint",
        None,
        "What to export: a run directory (its newest checkpoint), a checkpoint (RUN/checkpoints/STEP) of either backend, or "
        "published weights (a transformers directory, a hub name, a GGUF file, Meta's release) to bring into another format.",
    )
    flags.DEFINE_string("to", None, f"The format: {' | '.join(FORMATS)}, see above.")
    flags.DEFINE_string(
        "output", None, "The directory to write, or s3://BUCKET/PREFIX; it must not be there yet, or be empty."
    )
    cli.run(_main, description=__doc__, required=("checkpoint", "to", "output"))
