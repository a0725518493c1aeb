"""What begins and ends a text, as its publisher has it: the tokens at which generation stops."""

import dataclasses
import json

import pytest
import torch

from tests.test_pretrained import llama, randomised, write_gguf
from tests.test_train_pretrained import make_published
from wmtp_jax.checkpoint.manifest import seal
from wmtp_jax.checkpoint.parameters import FILE, write_arrays
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.errors import UserError
from wmtp_jax.export.export import export, load_whole
from wmtp_jax.inference.generate import generate
from wmtp_jax.model import abstract_parameters, merge, nest
from wmtp_jax.pretrained import open_pretrained
from wmtp_jax.run.inputs import describe_base, end_tokens

LENGTH = 24


@pytest.fixture(scope="module")
def published(python_corpus, tmp_path_factory):
    """A random llama that lists two end tokens, of which its greedy text reaches the second; what `transformers` makes of it."""
    directory = tmp_path_factory.mktemp("published")
    model = make_published(python_corpus, directory)
    prompts = [[5, 6, 7], [40, 41], [9, 100, 101, 102]]
    free = greedy(model, prompts[0], eos_token_id=None)
    listed = {"eos_token_id": [0, free[6]], "pad_token_id": 0}
    (directory / "generation_config.json").write_text(json.dumps(listed))
    model = type(model).from_pretrained(directory)
    return directory, prompts, [greedy(model, prompt) for prompt in prompts]


def greedy(model, prompt, **changes):
    with torch.no_grad():
        tokens = torch.tensor([prompt])
        made = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=LENGTH, do_sample=False, **changes
        )
    return made[0, len(prompt) :].tolist()


def continued(path, prompts):
    whole, _ = load_whole(path)
    model = merge(abstract_parameters(whole.settings)[0], nest(dict(whole.named)))
    return generate(model, prompts, max_new_tokens=LENGTH, stop_tokens=whole.end_tokens)


def run_of(directory, run):
    """A run that started from published weights, before its first update."""
    whole, tokenizer = load_whole(directory)
    checkpoint = run / "checkpoints" / "1"
    (checkpoint / FILE).parent.mkdir(parents=True)
    about = {"model": dataclasses.asdict(whole.settings), "pretrained": describe_base(open_pretrained(directory))}
    write_arrays(checkpoint / FILE, dict(whole.named), {"backend": "torch", **about})
    seal(checkpoint, 1)
    tokenizer.save(run / "tokenizer")
    return find_checkpoint(run)


def test_generation_stops_where_transformers_does(published, tmp_path):
    directory, prompts, theirs = published
    assert theirs[0][-1] != 0 and len(theirs[0]) <= 7, "the second end token ends this one"
    export(run_of(directory, tmp_path / "run"), to="hf", output=tmp_path / "out")
    for path in (directory, tmp_path / "run", tmp_path / "out"):
        made = continued(path, prompts)
        assert [tokens.tolist() for tokens in made.tokens] == theirs
        assert made.reasons[0] == "stop_token"


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, (3, 4)),
        ({"eos_token_id": 3}, {}, (3,)),
        ({"top_p": 0.9}, {"eos_token_id": [5, 6]}, (5, 6)),
        (None, {"eos_token_id": [5, 299, 300]}, (5, 299)),  # no token has the id 300
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_which_file_lists_the_end_tokens(generation, config, ends):
    assert end_tokens({"path": "here", "generation_config": generation, "config": config}, 300) == ends


def test_end_tokens_that_are_none():
    with pytest.raises(UserError, match="here: eos_token_id of its config = \\['</s>'\\]: must be a token id"):
        end_tokens({"path": "here", "generation_config": None, "config": {"eos_token_id": ["</s>"]}}, 300)


def test_a_gguf_files_end_of_turn_ends_a_text(tmp_path):
    model = randomised(llama())
    size = model.config.vocab_size
    eos, eot = (("tokenizer.ggml.eos_token_id", ("uint32", 2)), ("tokenizer.ggml.eot_token_id", ("uint32", 7)))
    named = [f"token{i}" for i in range(size - 2)] + ["<|im_end|>", "<|endoftext|>"]
    for keys, tokens, ends in [
        ([eos, eot], named, [2, 7]),
        ([eos], named, [2, size - 2, size - 1]),  # as llama.cpp finds them
        ([eos], size, [2]),
    ]:
        file = write_gguf(tmp_path / "model.gguf", model, keys=keys, tokens=tokens)
        origin = describe_base(open_pretrained(file))
        assert end_tokens(origin, size) == tuple(ends)
    assert open_pretrained(write_gguf(tmp_path / "model.gguf", model)).generation_config is None
    file = write_gguf(tmp_path / "model.gguf", model, keys=[("tokenizer.ggml.eot_token_id", ("string", "x"))])
    with pytest.raises(UserError, match="tokenizer.ggml.eot_token_id = 'x': must be a token id"):
        open_pretrained(file)
