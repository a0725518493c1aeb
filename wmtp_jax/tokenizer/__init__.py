"""Text to ids and back: byte-level BPE trained here, `transformers` directories, GGUF and SentencePiece files.

May import pretrained (its GGUF reader), storage and errors; no jax.
"""

from wmtp_jax.tokenizer.tokenizer import load_tokenizer

__all__ = ["load_tokenizer"]
