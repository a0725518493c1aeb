"""What a run measured: metrics.jsonl, the machine's figures, and MLflow's copy, delivered by a process of its own.

May import storage and errors; no jax.
"""
