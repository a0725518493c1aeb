"""What config.json of a MiMo-layout model means: a Qwen2 with `num_nextn_predict_layers` multi-token prediction layers."""

from transformers import Qwen2Config


class MiMoConfig(Qwen2Config):
    model_type = "mimo"
