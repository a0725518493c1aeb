"""Decoders whose checkpoint also holds multi-token prediction layers, for `generate(use_mtp=True)` of transformers 5.

    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)
    model.generate(**inputs, do_sample=False, use_mtp=True)

The stock classes name no such layers, so that `generate` can't find them; here they are `model.layers.N` and on, N being
`num_hidden_layers`, in DeepSeek's layout (enorm, hnorm, eh_proj over [embedding; hidden], the layer itself, shared_head.norm).
Without `use_mtp` the models are the stock ones.
"""

from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM


def _patterns(config):
    first = config.num_hidden_layers
    return {rf"^model\.layers\.{number}\." for number in range(first, first + config.num_mtp_layers)}


class LlamaMtpForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = _patterns(config)


class Qwen2MtpForCausalLM(Qwen2ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = _patterns(config)


class Qwen3MtpForCausalLM(Qwen3ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self._keys_to_ignore_on_load_unexpected = _patterns(config)
