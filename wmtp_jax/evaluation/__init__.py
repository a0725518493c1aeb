"""Is the model better, faster to decode, and what did its weights single out?

Submodules are imported by name. `tasks`, `sandbox` and `pass_at_k` load no jax, so that both backends share them.
"""
