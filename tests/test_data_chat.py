"""Which characters of a rendered conversation are targets, against templates that say so themselves."""


import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_data_finetuning import chat_files
from wmtp_jax.data.chat import Chat
from wmtp_jax.tokenizer.tokenizer import Tokenizer

_GENERATION = "{% generation %}", "{% endgeneration %}"


def turns(header, content, end, *, before="", after=""):
    """A template that writes each message between a header and an end, and marks the assistant's part."""
    return (
        f"{before}{{% for message in messages %}}{header}{{% if message.role == 'assistant' %}}"
        f"{_GENERATION[0]}{content}{end}{_GENERATION[1]}{{% else %}}{content}{end}{{% endif %}}{{% endfor %}}{after}"
    )


ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML_HEADER = "<|im_start|>{{ message.role }}\n"
SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"

TEMPLATES = {
    "chatml": turns(CHATML_HEADER, "{{ message.content }}", "<|im_end|>\n", after=ASKED),
    "a system prompt of its own": turns(
        CHATML_HEADER, "{{ message.content }}", "<|im_end|>\n", before=SYSTEM, after=ASKED
    ),
    "trimmed, without a line end": turns(
        "<|im_start|>{{ message.role }}<|im_end|>\n\n", "{{ message.content | trim }}", "<|endoftext|>",
        after="{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}",
    ),
    "no header is asked for": turns("{{ message.role }}: ", "{{ message.content }}", "\n"),
    "no end": turns("[{{ message.role }}]", "{{ message.content }}", ""),
    "an end only at the very end": turns(
        CHATML_HEADER, "{{ message.content }}", "<|im_end|>\n{% if loop.last %}<|endoftext|>{% endif %}"
    ),
    "counted": turns(
        CHATML_HEADER, "{{ message.content }}", "<|im_end|>\n", before="{{ messages | length }} turns\n", after=ASKED
    ),
    "empty messages left out": turns(
        "{% if message.content %}" + CHATML_HEADER,
        "{{ message.content }}", "<|im_end|>\n{% endif %}",
    ).replace("\n{% if message.role", "\n{% endif %}{% if message.role").replace(
        "{{ message.content }}<|im_end|>\n{% endif %}",
        "{% if message.content %}{{ message.content }}<|im_end|>\n{% endif %}",
    ),
    "an empty thought before the last reply": turns(
        "<|im_start|>{{ message.role }}\n{% if loop.last and message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}",
        "{{ message.content }}", "<|im_end|>\n", after=ASKED,
    ),
    "neighbours of one role share a header": turns(
        "{% if not loop.previtem or loop.previtem.role != message.role %}<|im_start|>{{ message.role }}\n{% endif %}",
        "{{ message.content }}",
        "{% if not loop.nextitem or loop.nextitem.role != message.role %}<|im_end|>\n{% else %}\n\n{% endif %}",
        after=ASKED,
    ),
    "instructions": (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %} {{ message.content }}"
        "<|endoftext|>{% endgeneration %}{% else %}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}"
    ),
}  # fmt: skip

# What headers, ends and special tokens look like, and what a template may trim.
CONTENTS = st.sampled_from(
    ["", "a", "two words", " before", "after \n", "assistant", "user\n", "assistant: ", "<|im_end|>\n", "<|im_start|>assistant\n",
     "[INST]", "one\n\ntwo", "<think>", "é"]
)  # fmt: skip
CONVERSATIONS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENTS}),
    min_size=1, max_size=6,
).filter(lambda messages: any(m["role"] == "assistant" and m["content"].strip() for m in messages))  # fmt: skip


@pytest.fixture(scope="module")
def chats():
    return {name: Chat(Tokenizer(chat_files(template), "test")) for name, template in TEMPLATES.items()}


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(messages=CONVERSATIONS)
def test_targets_are_the_replies_and_their_ends(chats, name, messages):
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], [spans] = render_jinja_template([messages], chat_template=TEMPLATES[name], return_assistant_tokens_mask=True)
    expected = [False] * len(text)
    for start, end in spans:
        expected[start:end] = [True] * (end - start)
    parts = chats[name].parts(messages, "F:1")
    assert "".join(part.text for part in parts) == text
    actual = [part.target for part in parts for _ in part.text]
    assert actual == expected, "".join(c if target else "·" for c, target in zip(text, actual, strict=True))
