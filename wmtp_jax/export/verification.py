"""Exports read back by others: `transformers`, and readers of the published layouts written from those layouts alone.

Nothing here is shared with what wrote the files: names, shapes and products are those of the engines that load them
(`transformers` `modeling_layers.MtpModel`; vLLM `models/medusa.py`, `models/mimo.py`, `models/mimo_mtp.py`; SGLang
`models/mimo_mtp.py`; Meta's `llama/model.py` of the multi-token prediction release). All in float32, on the CPU.

B rows, S positions, H heads, V vocabulary, D width.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from wmtp_jax.errors import UserError
from wmtp_jax.export.whole import Lazy
from wmtp_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

Tensors = dict[str, torch.Tensor]

transformers.utils.logging.disable_progress_bar()

# Rounding in float32, of the largest logit: for the 135M Llama 4e-6 in head 0, as far as `transformers` is from its own float64,
# and 1.2e-5 after three depths more. What is more than rounding but less than this is found by comparing bits.
TOLERANCE, RELATIVE = 1e-4, 2e-5
# What damaged files make the libraries raise.
_UNREADABLE = (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError, pickle.UnpicklingError)
_TEXT = "class Mean:\n    def mean(values):\n        return sum(values) / len(values)  # naïve, 100% — \u4f60\u597d\n\n\n"


class _Read(NamedTuple):
    """What a reader found.

    Attributes:
      logits: `[B, S', V]` of each head, S' being S less the tokens that the head looks ahead.
      notes: lines for the user.
    """

    logits: list[torch.Tensor]
    notes: tuple[str, ...] = ()


def check_tensors(directory: Path, files: Mapping[str, Mapping[str, Lazy]]) -> list[str]:
    """Reads files of weights again and compares every tensor, bit for bit, with what was to be written.

    Args:
      directory: the export.
      files: name -> tensors.

    Returns:
      a line that says what was verified.

    Raises:
      UserError: names the file and the tensor.
    """
    count = 0
    for name, tensors in files.items():
        try:
            if name.endswith(".pth"):
                stored = torch.load(directory / name, map_location="cpu", mmap=True, weights_only=True)
            else:
                stored = load_file(directory / name)
        except _UNREADABLE as error:
            raise UserError(f"{name} can't be read again ({_brief(error)}); nothing is kept") from error
        for key in sorted(stored.keys() | tensors.keys()):
            there = key in stored and key in tensors
            if not there or not np.array_equal(_bits(stored[key].numpy()), _bits(tensors[key][1]())):
                raise UserError(f"{name}: tensor {key} is not what was written (is the disk sound?); nothing is kept")
        count += len(tensors)
    return [f"verified: {count} tensors, bit for bit"]


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint32)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@torch.inference_mode()
def check(
    directory: Path, to: str, tokens: np.ndarray, wanted: np.ndarray, tokenizer: Tokenizer | None
) -> list[str]:
    """Compares what an export computes with what the model does.

    Args:
      directory: the export.
      to: its format.
      tokens: `[B, S]`.
      wanted: the model's logits `[B, S, H, V]`.
      tokenizer: the model's; None where the export has none.

    Returns:
      lines that say what was verified.

    Raises:
      UserError: the export is another model or can't be read.
    """
    reader = {"hf": _plain_with_heads, "hf-mtp": _deepseek, "medusa": _medusa, "mimo": _mimo, "meta": _meta}[to]
    what = f"transformers {transformers.__version__}" if to.startswith("hf") else f"a reader of the {to} layout"
    try:
        read = reader(directory, torch.from_numpy(tokens).long())
    except _UNREADABLE as error:
        raise UserError(f"--to={to}: {what} can't read what was written ({_brief(error)}); nothing is kept") from error
    if len(read.logits) != wanted.shape[2]:
        raise UserError(
            f"--to={to}: {what} finds {len(read.logits)} heads in what was written, and the model has {wanted.shape[2]}; "
            "nothing is kept"
        )
    worst = 0.0
    for k, logits in enumerate(read.logits):
        mine = wanted[:, : logits.shape[1], k]
        error = float(np.abs(logits.float().numpy() - mine).max())
        if not error <= max(TOLERANCE, RELATIVE * float(np.abs(mine).max())):
            raise UserError(
                f"--to={to}: head {k} of what was written gives other logits than the model, by {error:.2g}; nothing is kept"
            )
        worst = max(worst, error)
    rows, length = tokens.shape
    said = [f"verified by {what}: logits of {_count(len(read.logits))} at {rows} x {length} positions within {worst:.1g}"]
    if tokenizer is not None:
        _check_tokenizer(directory / "target" if to == "medusa" else directory, to, tokenizer)
        said.append("verified: the tokenizer cuts a sample text as the model's does")
    return said + list(read.notes)


def _count(heads: int) -> str:
    return "1 head" if heads == 1 else f"{heads} heads"


def _check_tokenizer(directory: Path, to: str, tokenizer: Tokenizer) -> None:
    mine = tokenizer.encode(_TEXT).tolist()
    try:
        if to == "meta":
            theirs = load_tokenizer(directory).encode(_TEXT).tolist()
        else:
            # The code that an export names is what came with it here.
            loaded = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
            theirs = loaded.encode(_TEXT, add_special_tokens=False)
    except Exception as error:  # the tokenizers library raises nothing narrower, whatever is wrong with a file
        raise UserError(f"--to={to}: the tokenizer that was written can't be read ({_brief(error)}); nothing is kept") from error
    if theirs != mine:
        raise UserError(f"--to={to}: the tokenizer that was written cuts text otherwise than the model's; nothing is kept")


# ---- hf ------------------------------------------------------------------------------------------------------------


def _load(directory: Path, **options: Any) -> transformers.PreTrainedModel:
    """The model by `transformers`, refused where tensors and configuration don't go together exactly."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, local_files_only=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[kind]:
            raise ValueError(f"{kind.replace('_', ' ')}: {sorted(map(str, found[kind]))[0]}")
    return model.eval()


def _plain_with_heads(directory: Path, tokens: torch.Tensor) -> _Read:
    model = _load(directory)
    output = model(tokens, output_hidden_states=True, use_cache=False)
    heads = directory / "wmtp_heads.json"
    if not heads.exists():
        return _Read([output.logits])
    about = json.loads(heads.read_text())
    stored = load_file(directory / about["file"])
    used: set[str] = set()

    def part(k: int) -> Tensors:
        prefix = f"heads.{k}."
        used.update(name for name in stored if name.startswith(prefix))
        return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}

    base = model.get_decoder() if about["layer"] != "gpt2" else model.transformer
    final_norm = base.norm if about["layer"] != "gpt2" else base.ln_f
    hidden, before_last = output.hidden_states[-1], output.hidden_states[-2]
    logits = [output.logits]
    for k in range(1, about["num_heads"]):
        tensors = part(k)
        match about["head_kind"]:
            case "linear":
                logits.append(hidden @ tensors["weight"].T)
            case "block":
                logits.append(model.lm_head(final_norm(_layer(model, base, tensors)(before_last))))  # pyrefly: ignore[not-callable]  # a module
            case _:
                own = {name: tensors.pop(name) for name in list(tensors) if name.split(".")[0] in _JOINING}
                norm = _norms(final_norm, own)
                ahead = model.get_input_embeddings()(tokens[:, k:])
                joined = torch.cat([norm("enorm", ahead), norm("hnorm", hidden[:, : ahead.shape[1]])], dim=-1)
                hidden = norm("post_norm", _layer(model, base, tensors)(joined @ own["eh_proj.weight"].T))
                logits.append(model.lm_head(hidden))
    if used != stored.keys():
        raise ValueError(f"{about['file']}: tensor {min(stored.keys() - used)} belongs to no head")
    return _Read(logits)


_JOINING = ("enorm", "hnorm", "eh_proj", "post_norm")


def _norms(like: torch.nn.Module, tensors: Tensors) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Norms of the kind of `like` with other weights."""

    def apply(name: str, x: torch.Tensor) -> torch.Tensor:
        weights = {part: tensors[f"{name}.{part}"] for part in dict(like.named_parameters())}
        return torch.func.functional_call(like, weights, (x,))

    return apply


def _layer(
    model: transformers.PreTrainedModel, base: torch.nn.Module, tensors: Tensors
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A decoder layer of the model's class with these tensors, all of them and no others."""
    kind = type((base.layers if hasattr(base, "layers") else base.h)[-1])  # pyrefly: ignore[bad-index]  # a ModuleList
    layer = kind(model.config, 0).eval()
    layer.load_state_dict(tensors)

    def run(x: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        extra = {"position_embeddings": base.rotary_emb(x, positions)} if hasattr(base, "rotary_emb") else {}  # pyrefly: ignore[not-callable]  # a module
        return layer(x, attention_mask=mask, position_ids=positions, **extra)

    return run


# ---- hf-mtp --------------------------------------------------------------------------------------------------------


def _deepseek(directory: Path, tokens: torch.Tensor) -> _Read:
    model = _load(directory, trust_remote_code=True)
    output = model(tokens, output_hidden_states=True, use_cache=False)
    depths = MtpModel.from_pretrained(model).eval()
    cache = MtpCache(config=model.config.get_mtp_config())
    hidden, logits = output.hidden_states[-1], [output.logits]
    for i in range(model.config.num_mtp_layers):
        ahead = tokens[:, 1 + i :]
        positions = torch.arange(1 + i, tokens.shape[1])[None]
        hidden = depths.forward_layer(i, hidden[:, : ahead.shape[1]], positions, cache, input_ids=ahead)
        logits.append(depths.shared_head(hidden))
    return _Read(logits)


# ---- medusa --------------------------------------------------------------------------------------------------------


def _medusa(directory: Path, tokens: torch.Tensor) -> _Read:
    target = _load(directory / "target")
    output = target(tokens, output_hidden_states=True, use_cache=False)
    hidden, logits = output.hidden_states[-1], [output.logits]
    config = json.loads((directory / "config.json").read_text())
    stored = load_file(directory / "model.safetensors")
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    if config["model_type"] != "medusa" or config["truncated_vocab_size"] != vocabulary:
        raise ValueError("config.json is not that of a Medusa model with the whole vocabulary")
    for i in range(config["num_heads"]):
        x = hidden
        for j in range(config["num_hidden_layers"]):
            x = x + torch.nn.functional.silu(x @ _shaped(stored, f"blocks.{i}.layers.{j}.weight", (width, width)).T)
        logits.append(x @ _shaped(stored, f"lm_heads.{i}.weight", (vocabulary, width)).T)
    if len(stored) != config["num_heads"] * (config["num_hidden_layers"] + 1):
        raise ValueError("model.safetensors holds tensors that no Medusa head has")
    return _Read(logits)


def _shaped(tensors: Tensors, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensors[name].shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, the engine's has {shape}")
    return tensors[name]


# ---- mimo ----------------------------------------------------------------------------------------------------------


def _mimo(directory: Path, tokens: torch.Tensor) -> _Read:
    stored = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    if (config["model_type"], config["architectures"]) != ("mimo", ["MiMoForCausalLM"]):
        raise ValueError("config.json is not that of a MiMo model")
    if config["num_nextn_predict_layers"] != 1:
        raise ValueError("MiMo's loaders run one multi-token prediction layer")
    _load(directory, trust_remote_code=True)
    # What the engines build: a Qwen2 from the whole file but the extra layer's tensors, in which nothing may be missing.
    ignored = ("architectures", "auto_map", "model_type")
    qwen2 = transformers.Qwen2Config(**{key: value for key, value in config.items() if key not in ignored})
    target = transformers.Qwen2ForCausalLM(qwen2).eval()
    prefix = "model.mtp_layers.0."
    target.load_state_dict({name: tensor for name, tensor in stored.items() if not name.startswith("model.mtp_layers.")})
    extra = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith("model.mtp_layers.")}
    raw: list[torch.Tensor] = []
    hook = target.model.norm.register_forward_pre_hook(lambda _, inputs: raw.append(inputs[0]))
    hidden = target.model(tokens, use_cache=False).last_hidden_state
    hook.remove()
    own = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
    outside = {name: extra.pop(name) for name in list(extra) if name.split(".")[0] in own}
    norm, layer = _norms(target.model.norm, outside), _layer(target, target.model, extra)

    def draft(states: torch.Tensor, *, blank: bool) -> torch.Tensor:
        """Logits of the extra layer; both engines blank the embedding at position 0."""
        embedded = target.model.embed_tokens(tokens[:, 1:])
        if blank:
            embedded = torch.where(torch.arange(embedded.shape[1])[None, :, None] == 0, 0.0, embedded)
        joined = torch.cat([norm("hidden_layernorm", states[:, :-1]), norm("token_layernorm", embedded)], dim=-1)
        return target.lm_head(norm("final_layernorm", layer(joined @ outside["input_proj.weight"].T)))

    exact = draft(hidden, blank=False)
    agree = [float((draft(states, blank=True).argmax(-1) == exact.argmax(-1)).float().mean()) for states in (hidden, raw[0])]
    note = (
        "engines draft a little otherwise than the model, which changes no text: SGLang blanks the first embedding "
        f"({agree[0]:.0%} of the drafts on these tokens stay the same), vLLM also reads the hidden state before the final norm "
        f"({agree[1]:.0%})"
    )
    return _Read([target.lm_head(hidden), exact], (note,))


# ---- meta ----------------------------------------------------------------------------------------------------------


def _meta(directory: Path, tokens: torch.Tensor) -> _Read:
    params = json.loads((directory / "params.json").read_text())
    stored = torch.load(directory / "consolidated.pth", map_location="cpu", weights_only=True)
    dim, heads, future = params["dim"], params["n_heads"], params["n_future_tokens"]
    groups, size = params.get("n_kv_heads") or heads, dim // heads
    inner = int(2 * 4 * dim / 3)
    if params.get("ffn_dim_multiplier") is not None:
        inner = int(params["ffn_dim_multiplier"] * inner)
    inner = params["multiple_of"] * ((inner + params["multiple_of"] - 1) // params["multiple_of"])
    expected = {"tok_embeddings.weight": (params["vocab_size"], dim), "norm.weight": (dim,)}
    expected["output.weight"] = (params["vocab_size"], dim)
    trunk = params["n_layers"] - future + 1
    blocks = [f"layers.{i}" for i in range(trunk)] + [f"extra_heads.{i}" for i in range(future - 1)]
    for block in blocks:
        expected |= {f"{block}.attention.w{name}.weight": (rows * size, dim)
                     for name, rows in (("q", heads), ("k", groups), ("v", groups))}  # fmt: skip
        expected |= {f"{block}.attention.wo.weight": (dim, heads * size), f"{block}.feed_forward.w2.weight": (dim, inner)}
        expected |= {f"{block}.feed_forward.w{i}.weight": (inner, dim) for i in (1, 3)}
        expected |= {f"{block}.{name}.weight": (dim,) for name in ("attention_norm", "ffn_norm")}
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"tensor {name}: {found.get(name)} written, Meta's code asks for {expected.get(name)}")

    length = tokens.shape[1]
    frequencies = 1.0 / (params.get("rope_theta", 10_000.0) ** (torch.arange(0, size, 2).float() / size))
    angles = torch.outer(torch.arange(length).float(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]
    mask = torch.full((length, length), -torch.inf).triu(1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)

    def normed(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * stored[f"{name}.weight"]

    def block(x: torch.Tensor, name: str) -> torch.Tensor:
        y = normed(x, f"{name}.attention_norm")
        q, k, v = ((y @ stored[f"{name}.attention.w{part}.weight"].T).unflatten(-1, (-1, size)) for part in "qkv")
        q, k = rotated(q), rotated(k)
        k, v = (part.repeat_interleave(heads // groups, dim=2) for part in (k, v))
        scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) / math.sqrt(size) + mask
        mixed = (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
        x = x + mixed @ stored[f"{name}.attention.wo.weight"].T
        y = normed(x, f"{name}.ffn_norm")
        w1, w2, w3 = (stored[f"{name}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
        return x + (torch.nn.functional.silu(y @ w1.T) * (y @ w3.T)) @ w2.T

    x = stored["tok_embeddings.weight"][tokens]
    for name in blocks[: trunk - 1]:
        x = block(x, name)
    logits = [normed(block(x, name), "norm") @ stored["output.weight"].T for name in blocks[trunk - 1 :]]
    sentencepiece = (directory / "tokenizer.model").exists()
    note = () if sentencepiece else (
        "the tokenizer is written as tokenizer.json: Meta's own code reads SentencePiece (tokenizer.model) only, and this one is "
        "not of that kind",
    )  # fmt: skip
    return _Read(logits, note)
