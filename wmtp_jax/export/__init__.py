"""A trained model in a published format: writers, the files that come with them, and readers that verify them.

May import pretrained, checkpoint, tokenizer, model and run.inputs; jax only to verify.
"""
