"""An update before it is run: operations and bytes by formula, and the real program lowered from shapes alone.

May import parallel, pretrained, checkpoint and the method; only `abstract_update` imports jax.
"""
