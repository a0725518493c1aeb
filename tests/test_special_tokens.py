"""What begins and ends a text, as its publisher has it."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from tests.test_data_problems import MBPP
from tests.test_pretrained import llama, randomised, write_gguf
from tests.test_tokenizer_directories import SENTENCEPIECE, written
from tests.test_train_pretrained import make_published
from wmtp_jax.checkpoint.manifest import seal
from wmtp_jax.checkpoint.parameters import FILE, write_arrays
from wmtp_jax.checkpoint.run_directory import find_checkpoint
from wmtp_jax.data.corpus import load_corpus
from wmtp_jax.data.documents import Document
from wmtp_jax.errors import UserError
from wmtp_jax.evaluation.results import read_lines
from wmtp_jax.evaluation.row_kinds import row_kinds
from wmtp_jax.evaluation.tasks import completion_of, load_task
from wmtp_jax.evaluation.token_kinds import KINDS
from wmtp_jax.evaluation.windows import make_windows
from wmtp_jax.export.export import export, load_whole
from wmtp_jax.inference.generate import generate
from wmtp_jax.model import abstract_parameters, merge, nest
from wmtp_jax.pretrained import open_pretrained
from wmtp_jax.run.inputs import describe_base, end_tokens
from wmtp_jax.tokenizer import load_tokenizer

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


def test_the_command_writes_what_transformers_does(published, tmp_path):
    """The prompt begins as the published tokenizer begins a text, the text ends at any of the listed ends, and ids past the
    tokenizer's last, which the padded model samples, stand for nothing."""
    directory, *_ = published
    (tmp_path / "tokenizer_config.json").write_bytes((directory / "tokenizer_config.json").read_bytes())
    spec = json.loads((directory / "tokenizer.json").read_text())
    first = {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
    parts = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    spec["post_processor"] = {
        "type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": {"<|endoftext|>": first},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(MBPP) + "\n")
    task = load_task("mbpp", tmp_path / "mbpp.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer(task.prompts[0]).input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    model.get_output_embeddings().weight.data[len(tokenizer) :] *= 1.5
    free = greedy(model, prompt, eos_token_id=None)
    model.generation_config.eos_token_id = [0, next(token for token in reversed(free) if token < len(tokenizer))]
    model.save_pretrained(tmp_path)
    flags = ["--tasks=mbpp", f"--data={tmp_path / 'mbpp.jsonl'}", f"--max_new_tokens={LENGTH}", f"--output={tmp_path / 'out'}"]
    call = [sys.executable, "-m", "wmtp_jax.evaluate", f"--checkpoint={tmp_path}", "--device=cpu", *flags]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = greedy(model, prompt, stop_strings=list(task.stops), tokenizer=tokenizer)
    result = json.loads((tmp_path / "out" / "mbpp.json").read_text())
    assert prompt[0] == 0 and len(made) < LENGTH and max(made) >= len(tokenizer)
    assert result["statistics"]["new_tokens"] == len(made)
    text = tokenizer.decode(made[:-1])  # the last one ends the text
    assert read_lines(tmp_path / "out" / "mbpp" / "samples.jsonl")[0]["completion"] == completion_of(task, text)


# ---- what begins a text ------------------------------------------------------------------------------------------------


TEXTS = ["def area(width):\n    return width\n" * 4, "plain words and more words", "x = 1\n" * 9, "", "more plain words " * 7]


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """A tokenizer that begins texts with <s>."""
    files = {"tokenizer.json": SENTENCEPIECE, "tokenizer_config.json": CONFIG}
    return written(tmp_path_factory.mktemp("beginning") / "tokenizer", files)


CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


def corpus_of(lines, directory, **options):
    path = directory / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"sequence_length": 16, "validation_fraction": 0.4, "cache_dir": str(directory / "cache")} | options
    return load_corpus([f"jsonl:{path}"], **options)


def segments_of(corpus):
    """The tokens of each segment, of both sides."""
    [source] = corpus.sources
    found = []
    for side in (source.train, source.validation):
        for tokens, ids in zip(side.columns["tokens"], side.columns["segment_ids"], strict=True):
            found += [tokens[ids == i].tolist() for i in range(1, ids.max() + 1)]
    return found


@pytest.mark.parametrize("form", ["text", "pairs"])
@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_every_segment_begins_as_the_tokenizer_has_it(form, bos, beginning, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(beginning)
    texts = [text for text in TEXTS if text.strip()]
    lines = [{"text": text} for text in texts]
    if form == "pairs":
        texts = [text[:9] for text in texts]
        lines = [{"prompt": text[:4], "completion": text[4:]} for text in texts]
    corpus = corpus_of(lines, tmp_path, tokenizer=str(beginning), bos=bos, sequence_length=16)
    segments, begin = segments_of(corpus), 1
    assert all((tokens[0] == begin) == (bos != "never") and begin not in tokens[1:] for tokens in segments)
    rest = [tokens[bos != "never" :] for tokens in segments]
    if form == "text":  # what rows cut apart is whole again
        stream = [token for tokens in rest for token in tokens]
        for text in texts:
            wanted = [*theirs(text, add_special_tokens=False).input_ids, 2]
            assert any(stream[i : i + len(wanted)] == wanted for i in range(len(stream))), text
    other = corpus_of(lines, tmp_path, tokenizer=str(beginning), bos="always" if bos == "never" else "never")
    assert corpus.hash != other.hash
    # A saved tokenizer goes on so, in `transformers` as well.
    again = load_tokenizer(corpus.directory / "tokenizer")
    assert again.fingerprint == corpus.tokenizer.fingerprint
    ids = transformers.AutoTokenizer.from_pretrained(corpus.directory / "tokenizer")("plain words").input_ids
    assert again.begin(again.encode("plain words")).tolist() == ids and (ids[0] == begin) == (bos != "never")


def test_a_tokenizer_that_begins_nothing_gives_the_rows_that_it_gave(tmp_path):
    lines = [{"text": text} for text in TEXTS if text]
    rows = [corpus_of(lines, tmp_path, vocabulary_size=280, bos=bos) for bos in ("auto", "never")]
    assert rows[0].hash == rows[1].hash and rows[0].tokenizer.begin_of_text_id is None
    with pytest.raises(UserError, match="config.data.bos = 'always': the trained bpe has no such token"):
        corpus_of(lines, tmp_path, vocabulary_size=280, bos="always")


def test_a_chat_template_that_begins_the_text_is_not_begun_again(beginning, tmp_path):
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    answer = {"role": "assistant", "content": "words"}
    asked = [{"role": "user", "content": f"plain {number}"} for number in range(8)]
    lines = [{"messages": [question, answer, asked[0], answer]} for question in asked]
    for number, template in enumerate(["{{ bos_token }}" + turns, turns]):
        directory = tmp_path / str(number)
        directory.mkdir()
        files = {"tokenizer.json": SENTENCEPIECE, "tokenizer_config.json": CONFIG | {"chat_template": template}}
        corpus = corpus_of(lines, directory, tokenizer=str(written(directory / "t", files)), sequence_length=64)
        assert all(tokens[0] == 1 and tokens.count(1) == 1 for tokens in segments_of(corpus))


def test_windows_begin_so_and_lose_nothing(beginning):
    tokenizer = load_tokenizer(beginning)
    documents = [(bytes([n]), Document("", text)) for n, text in enumerate(TEXTS)]
    begun, plain = (
        make_windows(documents, made, length=16, limit=None, source="texts")
        for made in (tokenizer, tokenizer.with_begin("never", key="key"))
    )
    assert (begun.tokens[:, 0] == 1).all() and (begun.tokens[:, 1:] != 1).all() and (plain.tokens != 1).all()
    assert (begun.kinds[:, 0] == KINDS.index("other")).all() and not begun.loss_mask[:, 0].any()
    for name in ("tokens", "kinds", "loss_mask"):
        mine, theirs = (
            getattr(windows, name)[(windows.segment_ids > 0) & (windows.tokens != 1)] for windows in (begun, plain)
        )
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("begin", ["<s>", "</s>"])
def test_kinds_of_rows_are_those_of_their_documents(begin, beginning, tmp_path):
    """Also where one token begins and ends a text."""
    config = CONFIG | {"bos_token": begin}
    directory = written(tmp_path / "t", {"tokenizer.json": SENTENCEPIECE, "tokenizer_config.json": config})
    lines = [{"text": f"def f{n}(x):\n    '''words\n    more words'''\n    return {n}\n"} for n in range(8)]
    corpora = [corpus_of(lines, tmp_path, tokenizer=str(directory), bos=bos) for bos in ("never", "always")]
    kinds = []
    for corpus in corpora:
        rows, made = corpus.sources[0].train, corpus.tokenizer
        found = np.stack([row_kinds(rows, number, made) for number in range(len(rows))])
        tokens, ids = rows.columns["tokens"], rows.columns["segment_ids"]
        first = np.diff(ids.astype(int), axis=1, prepend=0) != 0
        kinds.append(found[(ids > 0) & ~(first & (tokens == made.begin_of_text_id))])
    np.testing.assert_array_equal(*kinds)
