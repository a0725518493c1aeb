"""The next-token part of a MiMo-layout model, for transformers; vLLM and SGLang have their own classes and use the rest."""

from transformers import Qwen2ForCausalLM

from .configuration_mimo import MiMoConfig


class MiMoForCausalLM(Qwen2ForCausalLM):
    config_class = MiMoConfig
    _keys_to_ignore_on_load_unexpected = [r"^model\.mtp_layers\."]
