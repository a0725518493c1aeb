"""Text to ids and back: byte-level BPE trained here, `transformers` directories, GGUF and SentencePiece files.

May import pretrained (its GGUF reader), storage and errors; no jax.
"""
