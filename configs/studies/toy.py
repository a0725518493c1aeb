"""A study of a minute or two, to see the machinery: three arms, three seeds, no added controls.

Command:   python -m wmtp_jax.study --config=configs/studies/toy.py --workdir=studies/toy
Hardware:  2 CPU cores, 2 GiB of memory
Time:      three minutes at most
Expected:  nothing is decided: 60 updates of a tiny model and three seeds show only large effects
"""

from wmtp_jax.study.declaration import Study


def get_study() -> Study:
    """Two families that need no reference, on this program's own source."""
    return Study(
        question="Does weighting tokens help a model of 60 updates?",
        prediction="No: nothing so small can show it.",
        recipe="configs/quickstart.py",
        common={
            "data.sources": ("text:wmtp_jax/*.py", "text:wmtp_jax/data/*.py", "text:wmtp_torch/*.py"),
            "data.sequence_length": 64,
            "data.vocabulary_size": 512,
            "model.width": 32,
            "model.layers": 1,
            "model.attention_heads": 2,
            "model.heads.count": 2,
            "train.batch_size": 8,
            "train.steps": 60,
            "train.log_every": 10,
            "eval.every": 20,
            "eval.batches": 8,
            "eval.token_rows": 0,
            "eval.bigram": False,
            "eval.completions": 0,
            "checkpoint.every": 20,
            "tracking.enabled": False,
        },
        arms={
            "baseline": {"weighting.algorithm": "baseline-mtp"},
            "focal": {"weighting.algorithm": "focal"},
            "confidence": {"weighting.algorithm": "confidence"},
        },
        seeds=(0, 1, 2),
        difference=0.05,
        controls=False,
    )
