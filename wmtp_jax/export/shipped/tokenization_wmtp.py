"""The tokenizer in tokenizer.json as it is: for qwen2 models, `AutoTokenizer` takes Qwen's own way to cut text otherwise."""

from transformers import PreTrainedTokenizerFast


class WmtpTokenizer(PreTrainedTokenizerFast):
    pass
