"""What model, weights, critic and optimizer are, as frozen plain values made once at the edge; shared by both backends."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

# What is kept of a reference beside the tokens, and a batch may bring, `[B, S]` each.
REFERENCE_COLUMNS = ("reference_loss", "reference_entropy")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """What determines a model's parameters and function; made once from the configuration or from published weights.

    The fields mean what `wmtp_jax.config.model_defaults` says of them, with every 0 that stands for "derived" resolved.
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
        _check("head kind", self.head_kind, "linear", "block", "sequential")
        _check("remat", self.remat, "none", "layer", "dots")


@dataclasses.dataclass(frozen=True)
class Weighting:
    """The section `weighting` of the configuration, in the same words."""

    algorithm: str = "baseline-mtp"
    form: str = "default"
    score: str = "excess_loss"
    scope: str = "head"
    fraction: float = 0.7
    temperature: float = 1.0
    low: float = 0.1
    high: float = 3.0
    softmax_temperature: float = 0.7
    signed: bool = True
    threshold: float = 0.0
    gamma: float = 2.0
    decay: float = 0.8
    members: tuple[str, ...] = ()
    coefficients: tuple[float, ...] = ()
    permute: bool = False
    start_step: int = 0

    @property
    def needs_reference(self) -> bool:
        """Whether the weights depend on a reference model."""
        return self.algorithm in ("rho1-weighted", "rho1-tokenskip")

    @property
    def reference_columns(self) -> tuple[str, ...]:
        """Of `REFERENCE_COLUMNS`, what is read for these weights: the loss, and the entropy only where they depend on it."""
        if not self.needs_reference:
            return ()
        return REFERENCE_COLUMNS if self.score in ("reference_entropy", "reference_both") else REFERENCE_COLUMNS[:1]

    @property
    def needs_values(self) -> bool:
        """Whether the weights depend on a value function."""
        return self.algorithm == "critic-wmtp"

    @property
    def is_local(self) -> bool:
        """Whether a row's weights depend on that row alone, so that micro-batches can be weighted one by one."""
        if self.permute:
            return False
        if self.algorithm == "baseline-mtp" or self.form == "softmax_over_heads":
            return True
        return self.scope in ("position", "sequence")


@dataclasses.dataclass(frozen=True)
class Critic:
    """How values become weights, and how the value head learns: keys of the section `critic`, in the same words."""

    score: str = "value_change"
    discount: float = 1.0
    decay: float = 0.95
    coefficient: float = 1.0
    train_trunk: bool = False


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """The section `optimizer` of the configuration, in the same words, and the value head's own learning rate."""

    name: str
    learning_rate: float
    muon_learning_rate: float
    b1: float
    b2: float
    epsilon: float
    weight_decay: float
    clip_norm: float
    schedule: str
    warmup_steps: int
    decay_fraction: float
    final_fraction: float
    value_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        _check("optimizer", self.name, "adamw", "muon")


def _check(what: str, given: str, *known: str) -> None:
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
