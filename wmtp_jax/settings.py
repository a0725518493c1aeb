"""Every key of a configuration, once: its type, default, meaning and bounds. One frozen dataclass a section.

`Configuration` is the whole. `wmtp_jax.config` makes of it the tree that recipes and flags change, and of that tree a
`Configuration` again. A section checks itself as it is made: each value against its type and bounds, then the keys against each
other. What follows from a section's keys is a property or a method of it. `ModelSettings` at the end is a model with nothing
left to derive. Only the standard library and NumPy are imported, so that the method and both backends read this file.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NoReturn, TypeVar

import numpy as np

from wmtp_jax.errors import UserError

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
# What is kept of a reference beside the tokens, and a batch may bring, `[B, S]` each.
REFERENCE_COLUMNS = ("reference_loss", "reference_entropy")
SCOPES = ("position", "sequence", "batch", "head")
HEAD_KINDS = ("linear", "block", "sequential")
REMAT = ("none", "layer", "dots")
# An early-stopping or best-checkpoint metric is one of the evaluation's, and lower is better for all of them.
SINGLE_METRICS = ("eval/bits_per_byte", "eval/ce_mean")


# ---- what a key is ---------------------------------------------------------------------------------------------------

T = TypeVar("T")
# A key's type, or that of a tuple's members -> the types of a value. A whole number may stand for a float.
_TYPES = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a value may be, within its type."""

    choices: tuple[str, ...] = ()
    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf

    def hold(self, value: Any) -> bool:
        if self.choices:
            return value in self.choices
        return self.above < value < self.below and self.at_least <= value <= self.at_most

    def __str__(self) -> str:
        if self.choices:
            return " | ".join(choice or "''" for choice in self.choices)
        has_lowest, upper = self.at_least > -math.inf, min(self.below, self.at_most)
        if upper == math.inf:
            return f"{self.at_least} or more" if has_lowest else f"above {self.above}"
        lower = f"[{self.at_least}" if has_lowest else f"({self.above}"
        return f"in {lower}, {upper}" + ("]" if self.at_most < math.inf else ")")


def key(default: T, *choices: str, **limits: float) -> T:
    """A key with `Bounds` and its default. Of a tuple, they hold for every member. A key without bounds is a plain default."""
    field: Any = dataclasses.field(default=default, metadata={"bounds": Bounds(choices, **limits)})
    return field


@dataclasses.dataclass(frozen=True)
class Section:
    """Keys that belong together. A subclass says the `prefix` of its keys, as a command line writes them.

    Raises:
      UserError: one line that names the key with its prefix, its value and what it must be.
    """

    prefix: ClassVar[str]

    def __init_subclass__(cls, *, prefix: str):
        cls.prefix = prefix

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not isinstance(getattr(self, field.name), Section):
                self._check(field)

    def _check(self, field: dataclasses.Field) -> None:
        value, kind = getattr(self, field.name), str(field.type)
        of_members = kind.removeprefix("tuple[").removesuffix(", ...]")
        is_tuple = of_members != kind
        bounds = field.metadata.get("bounds")
        if is_tuple and type(value) is not tuple:
            self.refuse(field.name, f"of type {kind}")
        for entry in value if is_tuple else (value,):
            if type(entry) not in _TYPES[of_members]:
                self.refuse(field.name, f"of type {kind}")
            if isinstance(entry, float) and not math.isfinite(entry):
                self.refuse(field.name, "finite")
            if bounds is not None and not bounds.hold(entry):
                self.refuse(field.name, f"values that are each {bounds}" if is_tuple else str(bounds))

    def refuse(self, name: str, must: str) -> NoReturn:
        """UserError: the key, its value and what it must be."""
        raise UserError(f"{self.prefix}.{name} = {getattr(self, name)!r}: must be {must}")


def flatten(section: Section | Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, value) for every key of a section, in the order of declaration, or of one that was read as JSON."""
    keys = section if isinstance(section, Mapping) else vars(section)
    for name, value in keys.items():
        if isinstance(value, Section | Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# ---- the sections ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Data(Section, prefix="config.data"):
    """Texts, how they are cut into tokens, and rows of tokens."""

    # python-stdlib | text:GLOB | tfds:NAME[/SPLIT] (mbpp, humaneval, code_contests; see wmtp_jax/data/build.py)
    # | jsonl:PATH (objects with `text`, `prompt` and `completion`, or `messages`)
    sources: tuple[str, ...] = ("python-stdlib",)
    source_weights: tuple[float, ...] = key((), above=0)  # share of rows from each source; (): in proportion to their size
    # share of documents held out, chosen by a hash of their identity
    validation_fraction: float = key(0.03, above=0, below=1)
    sequence_length: int = key(256, at_least=1)  # S: tokens a row
    # bpe (byte-level, trained on the sources; with pretrained.path, the weights' own) | a directory or hub name of
    # `transformers` | a GGUF file
    tokenizer: str = "bpe"
    # what every segment begins with: auto (what the tokenizer puts before a text, if anything) | always (its bos_token) | never
    bos: str = key("auto", "auto", "always", "never")
    vocabulary_size: int = 1024  # of the trained bpe; ignored where a tokenizer is named
    cache_dir: str = ""  # where tokenised corpora are kept; "": $XDG_CACHE_HOME/wmtp or ~/.cache/wmtp
    prefetch: int = key(4, at_least=0)  # batches prepared ahead of the step
    label_field: str = "passed"  # the field of `jsonl:` objects that says whether a text is right (bool) or how good (number)
    failed_in_loss: bool = False  # texts labelled False are targets too; else they are there for the value function only

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            self.refuse("sources", "at least one of python-stdlib, text:GLOB, jsonl:PATH, tfds:NAME")
        if self.source_weights and len(self.source_weights) != len(self.sources):
            self.refuse("source_weights", f"one weight for each of {len(self.sources)} sources, or ()")
        if self.tokenizer == "bpe" and self.vocabulary_size < 257:
            self.refuse("vocabulary_size", "at least 257 (256 bytes and the end of text)")


@dataclasses.dataclass(frozen=True)
class Heads(Section, prefix="config.model.heads"):
    """What predicts the tokens after a position."""

    count: int = key(4, at_least=1)  # H: every position predicts the next H tokens
    kind: str = key("linear", *HEAD_KINDS)  # block: Meta, arXiv 2404.19737; sequential: DeepSeek-V3, arXiv 2412.19437


@dataclasses.dataclass(frozen=True)
class Model(Section, prefix="config.model"):
    """The decoder: together its keys cover the Llama, Qwen2, Qwen3 and GPT-2 families."""

    width: int = key(128, at_least=1)  # D, the size of the residual stream
    layers: int = key(2, at_least=1)  # transformer layers on the path of head 0
    attention_heads: int = key(4, at_least=1)  # query heads
    kv_heads: int = key(0, at_least=0)  # key and value heads (grouped-query attention); 0: as many as query heads
    head_dim: int = key(0, at_least=0)  # size of one attention head; 0: width / attention_heads
    # hidden size of the feed-forward part; 0: 8/3 width for swiglu, 4 width for gelu, rounded up to 32
    mlp_width: int = key(0, at_least=0)
    activation: str = key("swiglu", "swiglu", "gelu")  # gelu: the tanh form of GPT-2
    norm: str = key("rmsnorm", "rmsnorm", "layernorm")
    norm_epsilon: float = key(1e-6, above=0)
    positions: str = key("rope", "rope", "learned")
    rope_theta: float = key(10_000.0, above=0)  # base of the rotary frequencies
    max_positions: int = key(0, at_least=0)  # rows of the table of learned positions; 0: data.sequence_length
    qkv_bias: bool = False  # biases in the query, key and value projections (Qwen2)
    linear_bias: bool = False  # biases in every other projection, too (GPT-2)
    qk_norm: bool = False  # RMSNorm of queries and keys per head (Qwen3)
    tie_embeddings: bool = False  # head 0 uses the embedding as its unembedding
    initial_scale: float = key(0.02, above=0)  # standard deviation of the initial weights
    compute_dtype: str = key("float32", "float32", "bfloat16")  # of activations and products; parameters and losses stay float32
    # what the backward pass recomputes; layer: all but each layer's input; dots: all but products
    remat: str = key("none", *REMAT)
    heads: Heads = Heads()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim == 0 and self.width % self.attention_heads:
            self.refuse("width", f"a multiple of attention_heads ({self.attention_heads}), or set head_dim")
        if self.kv_heads and self.attention_heads % self.kv_heads:
            self.refuse("kv_heads", f"a divisor of attention_heads ({self.attention_heads})")
        own_dim = self.width // self.attention_heads
        if self.positions == "rope" and (self.head_dim or own_dim) % 2:
            self.refuse("head_dim", f"even where positions = 'rope' (width / attention_heads is {own_dim})")

    def resolve(self, vocabulary_size: int, sequence_length: int) -> ModelSettings:
        """The model for a tokenizer and a length of rows, with nothing left to derive."""
        wanted = self.width * (8 / 3 if self.activation == "swiglu" else 4)
        return ModelSettings(
            vocabulary_size=vocabulary_size,
            width=self.width,
            layers=self.layers,
            attention_heads=self.attention_heads,
            kv_heads=self.kv_heads or self.attention_heads,
            head_dim=self.head_dim or self.width // self.attention_heads,
            mlp_width=self.mlp_width or math.ceil(wanted / 32) * 32,
            max_positions=self.max_positions or sequence_length,
            num_heads=self.heads.count,
            head_kind=self.heads.kind,
            activation=self.activation,
            norm=self.norm,
            norm_epsilon=self.norm_epsilon,
            positions=self.positions,
            rope_theta=self.rope_theta,
            qkv_bias=self.qkv_bias,
            linear_bias=self.linear_bias,
            qk_norm=self.qk_norm,
            tie_embeddings=self.tie_embeddings,
            initial_scale=self.initial_scale,
            compute_dtype=self.compute_dtype,
            remat=self.remat,
        )


@dataclasses.dataclass(frozen=True)
class Pretrained(Section, prefix="config.pretrained"):
    """Training that starts from published weights."""

    # a `transformers` directory or hub name (owner/name or owner/name@revision), a GGUF file or package:NAME (the one in an
    # installed package), or a directory of Meta's multi-token-prediction release; the model is then theirs: of config.model
    # only heads, compute_dtype and remat are read, and data.tokenizer = "bpe" means the weights' own; "": random weights
    path: str = ""
    # what is trained: all | heads (the new ones; head 0 stays the published model) | lora (low-rank adapters on the trunk's
    # layers, and the new heads)
    trainable: str = key("all", "all", "heads", "lora")
    lora_rank: int = key(8, at_least=1)
    lora_alpha: float = key(16.0, above=0)  # adapters count alpha / rank times

    def with_adapters(self, model: ModelSettings) -> ModelSettings:
        """A model with the adapters that its trunk gets, if any."""
        if self.trainable != "lora":
            return model
        return dataclasses.replace(model, lora_rank=self.lora_rank, lora_scale=self.lora_alpha / self.lora_rank)


@dataclasses.dataclass(frozen=True)
class Weighting(Section, prefix="config.weighting"):
    """What every (position, head) term of the loss is worth."""

    algorithm: str = key("baseline-mtp", *ALGORITHMS)
    form: str = key("default", *SCORE_FORMS)  # how a score becomes a weight; default: the algorithm's own
    # what ranks tokens in the rho1 algorithms: excess_loss, over the reference; or the reference alone, as in Rho-1's appendix
    # where there is no clean data (python -m wmtp_jax.score --self_reference): reference_loss, its -log P(x[t] | x[<t]);
    # reference_entropy, that of its P(. | x[<t]); reference_both, what top_fraction keeps by the one and by the other as well.
    # Kept are the lowest. That is our reading of the authors' hypothesis, that what helps is to leave out noisy tokens; neither
    # their full text nor their code was at hand to check it
    score: str = key("excess_loss", *REFERENCE_SCORES)
    scope: str = key("head", *SCOPES)  # within what the weights have mean one
    fraction: float = key(0.7, above=0, at_most=1)  # top_fraction: the share that is kept, in whole thousandths
    temperature: float = key(1.0, above=0)  # exponential: of the standardised scores
    low: float = key(0.1, at_least=0)  # exponential: smallest weight before normalisation
    high: float = key(3.0, above=0)  # exponential: largest weight before normalisation
    softmax_temperature: float = key(0.7, above=0)  # softmax_over_heads: of the raw scores
    signed: bool = True  # excess loss (Rho-1) and the critic's score keep their sign; False: their absolute value
    threshold: float = key(0.0, at_least=0)  # excess losses smaller than this in magnitude count as 0
    gamma: float = key(2.0, at_least=0)  # focal: (1 - p)^gamma
    decay: float = key(0.8, above=0)  # head-decay: decay^k
    # hybrid: the families combined (weighted geometric mean), and the exponent of each
    members: tuple[str, ...] = key(("entropy", "head-decay"), *HYBRID_MEMBERS)
    coefficients: tuple[float, ...] = key((0.5, 0.5), at_least=0)
    permute: bool = False  # a control: the same weights, dealt out at random among the valid entries
    start_step: int = key(0, at_least=0)  # weights are uniform before this step (a warm-up without weighting)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form != "default" and self.algorithm not in SCORED_ALGORITHMS:
            self.refuse("form", f"'default' for {self.algorithm}: it makes its weights without a score")
        if self.score != "excess_loss":
            self._check_reference_score()
        if abs(self.fraction * 1000 - round(self.fraction * 1000)) > 1e-9:
            self.refuse("fraction", "in (0, 1], in whole thousandths")
        if self.low > self.high:
            self.refuse("low", f"at most weighting.high ({self.high})")
        if len(self.members) != len(self.coefficients) or not self.members:
            self.refuse("coefficients", f"one number for each of weighting.members {self.members}")

    def _check_reference_score(self) -> None:
        if not self.needs_reference:
            self.refuse("score", f"'excess_loss' for {self.algorithm}: it asks no reference")
        is_top_fraction = self.form == "top_fraction" or (self.form, self.algorithm) == ("default", "rho1-tokenskip")
        if self.score == "reference_both" and not is_top_fraction:
            must = "another than reference_both unless the form is top_fraction: it is what two such choices both keep"
            self.refuse("score", must + " (rho1-tokenskip, or config.weighting.form=top_fraction)")
        why = f"where weighting.score = {self.score!r}: it belongs to excess_loss"
        if not self.signed:
            self.refuse("signed", f"True {why}")
        if self.threshold:
            self.refuse("threshold", f"0.0 {why}")

    @property
    def needs_reference(self) -> bool:
        """Whether the weights depend on a reference model."""
        return ALGORITHMS[self.algorithm] == "reference"

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """Of `REFERENCE_COLUMNS`, what is read for these weights: the loss, and the entropy only where they depend on it."""
        if not self.needs_reference:
            return ()
        return REFERENCE_COLUMNS if self.score in ("reference_entropy", "reference_both") else REFERENCE_COLUMNS[:1]

    @property
    def needs_values(self) -> bool:
        """Whether the weights depend on a value function."""
        return ALGORITHMS[self.algorithm] == "values"

    @property
    def is_local(self) -> bool:
        """Whether a row's weights depend on that row alone, so that micro-batches can be weighted one by one."""
        if self.permute:
            return False
        if self.algorithm == "baseline-mtp" or self.form == "softmax_over_heads":
            return True
        return self.scope in ("position", "sequence")


@dataclasses.dataclass(frozen=True)
class ReferenceHeads(Heads, prefix="config.reference.model.heads"):
    count: int = key(1, at_least=1)  # an ordinary model of the next token


@dataclasses.dataclass(frozen=True)
class ReferenceModel(Model, prefix="config.reference.model"):
    heads: Heads = ReferenceHeads()


@dataclasses.dataclass(frozen=True)
class Reference(Section, prefix="config.reference"):
    """The reference model, for the rho1 algorithms and for rewards by likelihood."""

    # a run directory or checkpoint of this program, or published weights as pretrained.path takes them; "": train one first,
    # see steps
    path: str = ""
    # auto: those that python -m wmtp_jax.score stored for this data, where there are any, else computed in every step
    # | step: computed in every step | a directory that score made: these and no others
    losses: str = "auto"
    # next_token: from each target's own prefix; same_prefix: from the heads of an MTP reference
    alignment: str = key("next_token", "next_token", "same_prefix")
    steps: int = key(0, at_least=0)  # where path is "": steps of the reference's own run; 0: refuse to start without a path
    model: Model = ReferenceModel()  # where path is "": of the reference's own run

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.losses:
            self.refuse("losses", "auto, step or a directory of stored losses")
        if self.losses not in ("auto", "step") and self.alignment == "same_prefix":
            self.refuse("losses", "step where reference.alignment = 'same_prefix': one loss a token is stored")


@dataclasses.dataclass(frozen=True)
class Reward(Section, prefix="config.reward"):
    """What critic-wmtp's value function learns: a number a text, standardised over the training rows."""

    # likelihood: mean log-likelihood a token under the reference model | unit_tests: the labels stored with the data
    # | reward_model: a published sequence classifier, or a function of one's own
    source: str = key("likelihood", "likelihood", "unit_tests", "reward_model")
    # reward_model: a `transformers` directory or hub name of a *ForSequenceClassification with one label and this run's
    # tokenizer, or MODULE:FUNCTION, (token arrays, tokenizer) -> numbers
    model: str = ""


@dataclasses.dataclass(frozen=True)
class Critic(Section, prefix="config.critic"):
    """For critic-wmtp; its stages are runs of their own in WORKDIR/trunk and WORKDIR/value."""

    # a run or checkpoint of this program with the same model, or published weights; "": train one first, see trunk_steps
    trunk: str = ""
    # where trunk is "": steps of a baseline-mtp run, from pretrained.path or random; 0: the published weights are the trunk
    trunk_steps: int = key(0, at_least=0)
    head: str = ""  # a value head trained on that very trunk (WORKDIR/value of another run); "": train one first
    steps: int = key(500, at_least=1)  # where head is "": updates of the value head alone, on the frozen trunk
    stop_after: str = key("", "", "trunk", "value")  # end after that stage; "": go on to the model
    learning_rate: float = key(1e-3, above=0)  # of the value head, in both stages, with the optimizer's schedule
    discount: float = key(1.0, at_least=0, at_most=1)  # γ
    # λ of the returns that the head learns, and of the generalized advantage
    decay: float = key(0.95, at_least=0, at_most=1)
    eval_every: int = key(100, at_least=1)  # steps of the value stage between evaluations
    # evaluations without a lower value loss before the value stage ends; its best head is kept
    patience: int = key(3, at_least=1)
    allow_unexplained: bool = False  # go on with a head that explains none of the held-out rewards' variance
    score: str = key("value_change", "value_change", "advantage")  # what a token is worth; advantage: the generalized one
    coefficient: float = key(1.0, at_least=0)  # of the value loss beside the model's
    train_trunk: bool = False  # the value loss also trains the trunk


@dataclasses.dataclass(frozen=True)
class Train(Section, prefix="config.train"):
    """How long and on how much at a time."""

    seed: int = key(0, at_least=0, below=2**31)
    steps: int = key(1000, at_least=0)  # updates; 0 where epochs say how long
    epochs: float = key(0.0, at_least=0)  # passes over the training rows; 0 where steps say how long
    batch_size: int = key(8, at_least=1)  # rows an update, over all devices, processes and accumulation steps
    # micro-batches an update; fewer where more devices than the rows of one share them out
    accumulation: int = key(1, at_least=1)
    loss_chunk: int = key(0, at_least=0)  # tokens whose logits are held at once; 0: chosen by the loss
    log_every: int = key(50, at_least=1)
    # (first, last) update that jax.profiler traces, into profile/ of the stage's directory; (): none
    profile: tuple[int, ...] = key((), at_least=1)
    # non-finite updates that are skipped and counted before the run stops; 0: stop at the first
    nonfinite_limit: int = key(0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.steps > 0) == (self.epochs > 0):
            raise UserError("config.train.steps and config.train.epochs: exactly one must be above 0, the other 0")
        if self.batch_size % self.accumulation:
            self.refuse("accumulation", f"a divisor of train.batch_size ({self.batch_size})")
        if self.profile and (len(self.profile) != 2 or self.profile[0] > self.profile[1]):
            self.refuse("profile", "() or (first, last), updates counted from 1")

    def total_steps(self, rows: int) -> int:
        """Updates in all, where a pass over the training rows has so many."""
        return self.steps or max(1, math.ceil(self.epochs * rows / self.batch_size))


@dataclasses.dataclass(frozen=True)
class Mesh(Section, prefix="config.mesh"):
    """How many devices each axis of the mesh has; their product is the number of devices (of all processes).

    -1, for one of them: those that the others leave, and for data and fsdp as many of these as the rows of a batch can be
    shared out over. One device in all: nothing is split. See wmtp_jax/parallel/sharding.py.
    """

    data: int = -1  # rows
    fsdp: int = 1  # rows, and parameters, gradients and optimizer state over the width
    tensor: int = 1  # attention heads, hidden units of the feed-forward part, vocabulary
    sequence: int = 1  # positions

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                self.refuse(axis, "1 or more devices, or -1 for those that the other axes leave")
        rest = [axis for axis, size in sizes.items() if size == -1]
        if len(rest) > 1:
            self.refuse(rest[1], f"1 or more devices where config.mesh.{rest[0]} is -1: one axis gets the rest")


@dataclasses.dataclass(frozen=True)
class Optimizer(Section, prefix="config.optimizer"):
    """The update rule and its schedule."""

    name: str = key("adamw", "adamw", "muon")  # muon: matrices by Muon, embeddings, heads' unembeddings and vectors by AdamW
    learning_rate: float = key(3e-3, above=0)  # of AdamW
    muon_learning_rate: float = key(0.02, above=0)  # of Muon's matrices
    b1: float = key(0.9, at_least=0, below=1)
    b2: float = key(0.95, at_least=0, below=1)
    epsilon: float = key(1e-8, above=0)
    weight_decay: float = key(0.0, at_least=0)  # decoupled, on matrices only
    clip_norm: float = key(1.0, at_least=0)  # global norm of the gradient; 0: off
    schedule: str = key("cosine", "cosine", "wsd", "constant")  # wsd: warm-up, stable, decay
    warmup_steps: int = key(50, at_least=0)
    decay_fraction: float = key(0.2, at_least=0, at_most=1)  # wsd: the last share of the run, over which the rate falls linearly
    final_fraction: float = key(0.1, at_least=0, at_most=1)  # the learning rate at the end as a share of the highest

    @property
    def peak_rate(self) -> float:
        """The highest rate that a model's matrices get."""
        return self.muon_learning_rate if self.name == "muon" else self.learning_rate


@dataclasses.dataclass(frozen=True)
class Eval(Section, prefix="config.eval"):
    """What is measured on held-out rows, and how often."""

    # steps between evaluations; one is made before the first and after the last; 0: only those
    every: int = key(500, at_least=0)
    batches: int = key(32, at_least=1)  # validation batches (of train.batch_size rows) each time, spread over the validation rows
    stop_metric: str = ""  # early stopping on this evaluation metric (lower is better); "": off
    patience: int = key(3, at_least=1)  # evaluations without a better value before stopping
    token_rows: int = key(8, at_least=0)  # validation rows whose weights and losses go to tokens/STEP.npz; 0: none
    bigram: bool = True  # compare with an interpolated bigram model at the end
    completions: int = key(3, at_least=0)  # sampled completions of validation code shown at the end
    completion_tokens: int = key(96, at_least=1)
    completion_temperature: float = key(0.7, at_least=0)


@dataclasses.dataclass(frozen=True)
class Checkpoint(Section, prefix="config.checkpoint"):
    """What is saved of a run, and where."""

    every: int = key(500, at_least=0)  # steps between saves; the last step is always saved; 0: only that
    keep_last: int = key(2, at_least=1)
    # how long training stands still for a save to be on the disk, at most; a slower one is finished beside the next steps. A run
    # that is killed loses no more than `every` steps where saves take no longer, else those beside the save as well. 0: never
    wait_seconds: float = key(5.0, at_least=0, at_most=1_000_000)
    # s3://BUCKET/PREFIX: a copy of the run is kept there in the background, and what is newer there is gone on with (--workdir of
    # such a path sets this); "": none
    remote: str = ""
    best_metric: str = "eval/bits_per_byte"  # the save with its lowest value is kept as well; "": none

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remote and not self.remote.startswith("s3:/"):
            self.refuse("remote", "'' or s3://BUCKET/PREFIX")


@dataclasses.dataclass(frozen=True)
class Tracking(Section, prefix="config.tracking"):
    """What MLflow is told."""

    enabled: bool = True
    uri: str = ""  # "": a sqlite store beside the run directory; or sqlite:///PATH, http://HOST:PORT
    experiment: str = "wmtp"
    sweep: str = ""  # the name of a sweep: its runs are children of one MLflow run of that name; "": none
    # where a new experiment's artifacts are kept: a directory or s3://BUCKET/PREFIX; "": beside a sqlite store, or as the server
    # has it
    artifacts: str = ""
    model: str = "wmtp"  # a finished model is registered in MLflow under this name, parameters included; "": it is not
    # between two samples of processor, memory, disk, network and GPUs; 0: none
    system_seconds: float = key(10.0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if "://" in self.artifacts and not self.artifacts.startswith("s3:/"):
            self.refuse("artifacts", "'', a directory or s3://BUCKET/PREFIX")
        for name, value in (("sweep", self.sweep), ("model", self.model)):
            if set(value) & set("'\"/:"):
                self.refuse(name, "a name without quotes, / and :")


@dataclasses.dataclass(frozen=True)
class Configuration(Section, prefix="config"):
    """The whole. What holds for every stage of an experiment is checked as it is made, what holds for an experiment that is to
    start by `check_experiment`."""

    data: Data = Data()
    model: Model = Model()
    pretrained: Pretrained = Pretrained()
    weighting: Weighting = Weighting()
    reference: Reference = Reference()
    reward: Reward = Reward()
    critic: Critic = Critic()
    train: Train = Train()
    mesh: Mesh = Mesh()
    optimizer: Optimizer = Optimizer()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    def __post_init__(self) -> None:
        super().__post_init__()
        heads, length = self.model.heads.count, self.data.sequence_length
        if length <= heads:
            self.data.refuse("sequence_length", f"above model.heads.count ({heads})")
        self._check_positions(self.model)
        if self.weighting.scope == "position" and heads == 1 and self.weighting.algorithm != "baseline-mtp":
            must = "sequence, batch or head where model.heads.count is 1: one head has nothing to share"
            self.weighting.refuse("scope", must)
        if self.pretrained.trainable == "heads" and heads == 1:
            must = "all or lora where model.heads.count is 1: there is no new head to train"
            self.pretrained.refuse("trainable", must)
        metrics = (*SINGLE_METRICS, *(f"eval/ce_head_{k}" for k in range(heads)))
        if self.weighting.needs_values:
            metrics += ("eval/value_loss",)
        must = "'' or one of " + ", ".join(metrics)
        if self.eval.stop_metric not in ("", *metrics):
            self.eval.refuse("stop_metric", must)
        if self.checkpoint.best_metric not in ("", *metrics):
            self.checkpoint.refuse("best_metric", must)

    def _check_positions(self, model: Model) -> None:
        length = self.data.sequence_length
        if model.positions == "learned" and 0 < model.max_positions < length:
            model.refuse("max_positions", f"at least data.sequence_length ({length}), or 0")

    def check_experiment(self) -> None:
        """Refuses an experiment whose first stage has nothing to start from.

        Raises:
          UserError: names what is missing and the key that gives it.
        """
        algorithm, reference, critic = self.weighting.algorithm, self.reference, self.critic
        if self.uses_reference and not reference.path:
            if not reference.steps:
                why = " with reward.source = 'likelihood'" if self.weighting.needs_values else ""
                raise UserError(
                    f"config.weighting.algorithm = {algorithm!r}{why} needs a reference model: set config.reference.path to a "
                    "trained run, or config.reference.steps to train one first"
                )
            self._check_positions(reference.model)
            wanted = self.model.heads.count
            same_prefix = self.weighting.needs_reference and reference.alignment == "same_prefix"
            if same_prefix and reference.model.heads.count < wanted:
                must = f"at least model.heads.count ({wanted}) where reference.alignment = 'same_prefix'"
                reference.model.heads.refuse("count", must)
        trunk = critic.trunk if self.weighting.needs_values else ""
        if self.pretrained.trainable != "all" and not self.pretrained.path and not trunk:
            self.pretrained.refuse("trainable", "'all' without config.pretrained.path: random weights have to be trained")
        if not self.weighting.needs_values:
            return
        if not critic.trunk and not critic.trunk_steps and not self.pretrained.path:
            raise UserError(
                f"config.weighting.algorithm = {algorithm!r} starts from a trained model: set config.critic.trunk to a trained "
                "run or published weights, or config.critic.trunk_steps to train a baseline-mtp run first"
            )
        if critic.head and not critic.trunk and (critic.trunk_steps or not self.pretrained.path):
            raise UserError(
                f"config.critic.head = {critic.head!r}: belongs to the model it was trained on; set config.critic.trunk to it"
            )
        if self.reward.source == "reward_model" and not self.reward.model:
            self.reward.refuse("model", "a directory or MODULE:FUNCTION where reward.source = 'reward_model'")

    @property
    def uses_reference(self) -> bool:
        """Whether a run needs a reference model: for its weights, or for its rewards."""
        by_likelihood = self.weighting.needs_values and self.reward.source == "likelihood"
        return self.weighting.needs_reference or by_likelihood


def stored_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a run's config.json by dotted name, JSON values. One that is newer than the run counts as its default, under
    which a run is what it was before there was the key."""
    defaults = json.loads(json.dumps(dataclasses.asdict(Configuration())))
    return dict(flatten(defaults)) | dict(flatten(config))


# ---- a model with nothing left to derive -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What determines a model's parameters and function; made once from the configuration or from published weights.

    The fields mean what `Model` says of them, with every 0 that stands for "derived" resolved.
    Those that only published weights, and training from them, set:
      output_bias: a bias in the attention's output projection (Llama and Qwen3 with `attention_bias`).
      mlp_bias: biases in the feed-forward projections (Llama with `mlp_bias`).
      lora_rank, lora_scale: size and factor of the low-rank adapters on the trunk's layers, see `trainable.py`; 0: none.
      rope_scaling: none | linear | llama3 | yarn, how the rotary frequencies are stretched, by `rope_factor`; the other
        `rope_*` fields are the constants of llama3 and yarn, in the words of `rotary_frequencies`.
    """

    vocabulary_size: int
    width: int
    layers: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    num_heads: int
    head_kind: str
    activation: str = "swiglu"
    norm: str = "rmsnorm"
    norm_epsilon: float = 1e-6
    positions: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_positions: int = 0
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = True
    rope_attention_factor: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    initial_scale: float = 0.02
    compute_dtype: str = "float32"
    remat: str = "none"
    lora_rank: int = 0
    lora_scale: float = 1.0

    def __post_init__(self) -> None:
        _check("head kind", self.head_kind, HEAD_KINDS)
        _check("remat", self.remat, REMAT)


def _check(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{what} {given!r}: must be one of {', '.join(known)}")


def rotary_frequencies(settings: ModelSettings) -> np.ndarray:
    """Angles a position, float32 `[C / 2]`, rounded where `transformers` rounds, since an error grows with the position.

    With f_i = theta^(-2 i / C) and wave length l_i = 2 pi / f_i:
      none: f_i
      linear: f_i / factor
      llama3: f_i for l < P / high, f_i / factor for l > P / low, and between them the mean of both, weighted by
        s = (P / l - low) / (high - low) and 1 - s; P is `rope_original_positions`
      yarn (arXiv 2309.00071): f_i / factor weighted by a ramp r_i and f_i by 1 - r_i; r goes from 0 to 1 between the i
        that turn `beta_fast` and `beta_slow` times in P positions. Cosines and sines are multiplied by
        `rope_attention_factor` besides.
    """
    s, one = settings, np.float32(1)
    exponents = np.arange(0, s.head_dim, 2, dtype=np.float32) / np.float32(s.head_dim)
    # A correctly rounded float32 power, which float32 arithmetic in NumPy does not promise.
    powers = (np.float64(s.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
    plain = one / powers
    match s.rope_scaling:
        case "none":
            return plain
        case "linear":
            return plain / np.float32(s.rope_factor)
        case "llama3":
            original, low, high = s.rope_original_positions, s.rope_low_frequency, s.rope_high_frequency
            # A number over an array is number times reciprocal in torch, which rounds twice.
            length = one / plain * np.float32(2 * math.pi)
            scaled = np.where(length > original / low, plain / np.float32(s.rope_factor), plain)
            share = (one / length * np.float32(original) - np.float32(low)) / np.float32(high - low)
            mixed = (one - share) * scaled / np.float32(s.rope_factor) + share * scaled
            between = ~(length < original / high) & ~(length > original / low)
            return np.where(between, mixed, scaled)
        case "yarn":

            def index_turning(times: float) -> float:
                turns = s.rope_original_positions / (times * 2 * math.pi)
                return s.head_dim * math.log(turns) / (2 * math.log(s.rope_theta))

            first, last = index_turning(s.rope_beta_fast), index_turning(s.rope_beta_slow)
            if s.rope_truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, s.head_dim - 1)
            if first == last:
                last += 0.001
            index = np.arange(s.head_dim // 2, dtype=np.float32)
            keep = one - np.clip((index - np.float32(first)) / np.float32(last - first), 0, 1)
            return one / (np.float32(s.rope_factor) * powers) * (one - keep) + plain * keep
    raise ValueError(f"rope_scaling {s.rope_scaling!r}: must be none, linear, llama3 or yarn")
