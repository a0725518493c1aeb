"""A study: arms x seeds of one question, run by the ordinary trainer, and the verdict on them.

It starts runs as processes and reads what they wrote. May import configuration, data, planning, storage, tracking and report;
nothing here imports jax or torch, and nothing imports a study.
"""
