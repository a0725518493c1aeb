"""From documents to batches, without jax: sources, tokenizer, packed rows on disk, the target shift, the pipeline.

`corpus.load_corpus` makes (or finds) the packed rows, `pipeline.batches` and `pipeline.validation_batches` read them.
"""
