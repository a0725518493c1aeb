"""How fast this decodes: beside `transformers`, over batch sizes and prompt lengths, and with the heads as draft.

Commands, each on its own:
  python experiments/decoding/decoding.py transformers WEIGHTS.gguf [--pairs 5] [--new 64]
  python experiments/decoding/decoding.py grid MODEL [--new 64]
  python experiments/decoding/decoding.py speculative RUN [--pairs 5] [--new 192]
  python experiments/decoding/decoding.py memorised [--pairs 5] [--layers 2] [--width 128] [--kinds linear,block,sequential]
  python experiments/decoding/decoding.py products

MODEL is a run directory or published weights; RUN a run directory, whose tokenizer cuts this project's own source into prompts.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wmtp_jax.checkpoint.orbax import load_model
from wmtp_jax.data.pipeline import make_batch
from wmtp_jax.inference.cached_model import Unrolled, unroll
from wmtp_jax.inference.generate import Generation, generate
from wmtp_jax.model import ModelSettings, initial_parameters, merge
from wmtp_jax.pretrained import load_pretrained, open_pretrained
from wmtp_jax.settings import Weighting
from wmtp_jax.tokenizer.tokenizer import load_tokenizer
from wmtp_jax.train_step import initial_state, train_step
from wmtp_jax.update import Objective

SOURCE = Path(__file__).parents[2] / "wmtp_jax"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("transformers", "grid", "speculative", "memorised", "products"))
    parser.add_argument("path", nargs="?")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--new", type=int, default=0)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--kinds", default="linear,block,sequential")
    arguments = parser.parse_args()
    if arguments.path is None and arguments.what in ("transformers", "grid", "speculative"):
        parser.error(f"{arguments.what}: give the path of a model")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    match arguments.what:
        case "transformers":
            against_transformers(arguments.path, pairs=arguments.pairs, new=arguments.new or 64)
        case "grid":
            grid(open_model(arguments.path), new=arguments.new or 64)
        case "speculative":
            speculative(arguments.path, pairs=arguments.pairs, new=arguments.new or 192)
        case "products":
            products()
        case "memorised":
            for kind in arguments.kinds.split(","):
                memorised(kind, pairs=arguments.pairs, layers=arguments.layers, width=arguments.width)


# ---- beside transformers ---------------------------------------------------------------------------------------------


def against_transformers(path: str, *, pairs: int, new: int) -> None:
    """Ordinary greedy decoding of the same values, one prompt of 32 tokens, interleaved pairs; whole calls.

    `transformers` runs with one thread and with all, since beside other work its threads wait for each other.
    """
    import torch

    theirs, ours = transformers_model(path), unroll(load_pretrained(path), drafting=False)
    threads = torch.get_num_threads()
    rates = []
    for pair in range(-1, pairs):  # the first warms up
        prompt = np.random.default_rng(pair + 1).integers(0, ours.settings.vocabulary_size, 32)
        ids = torch.from_numpy(prompt)[None]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "min_new_tokens": new}
        seconds = []
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            began = time.perf_counter()
            with torch.no_grad():
                wanted = theirs.generate(ids, **options, do_sample=False, use_cache=True)[0, len(prompt) :]
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        got = generate(ours, [prompt], max_new_tokens=new)
        seconds.append(time.perf_counter() - began)
        if pair >= 0:
            rates.append([new / one for one in seconds])
            print(f"pair {pair}: {', '.join(f'{rate:.1f}' for rate in rates[-1])} tokens/s, "
                  f"equal output: {np.array_equal(wanted.numpy(), got.tokens[0])}", flush=True)  # fmt: skip
    *others, own = zip(*rates, strict=True)
    ratio = statistics.median(a / max(b) for a, b in zip(own, zip(*others, strict=True), strict=True))
    print(f"medians: transformers {', '.join(f'{statistics.median(rate):.1f}' for rate in others)} tokens/s at "
          f"{' and '.join(map(str, sorted({1, threads})))} threads, ours {statistics.median(own):.1f}; "
          f"median ratio to the faster of the pair {ratio:.2f} (torch {torch.__version__})")  # fmt: skip


def transformers_model(path: str):
    """`LlamaForCausalLM` with the values of a GGUF file, read by our reader."""
    import torch
    import transformers

    opened = open_pretrained(path)
    s, read = opened.settings, opened.read
    config = transformers.LlamaConfig(
        vocab_size=s.vocabulary_size, hidden_size=s.width, intermediate_size=s.mlp_width, num_hidden_layers=s.layers,
        num_attention_heads=s.attention_heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
        max_position_embeddings=s.max_positions, rms_norm_eps=s.norm_epsilon, rope_theta=s.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta}, tie_word_embeddings=s.tie_embeddings,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    names = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "final_norm.scale"}
    parts = {"self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key", "self_attn.v_proj": "attention.value",
             "self_attn.o_proj": "attention.output", "mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up",
             "mlp.down_proj": "mlp.down"}  # fmt: skip
    for i in range(s.layers):
        names |= {f"model.layers.{i}.{theirs}.weight": f"layers.{i}.{ours}.kernel" for theirs, ours in parts.items()}
        names[f"model.layers.{i}.input_layernorm.weight"] = f"layers.{i}.attention_norm.scale"
        names[f"model.layers.{i}.post_attention_layernorm.weight"] = f"layers.{i}.mlp_norm.scale"
    values = {theirs: read(ours).T if ours.endswith("kernel") else read(ours) for theirs, ours in names.items()}
    model = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in values.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model


# ---- batch sizes and prompt lengths ----------------------------------------------------------------------------------


def open_model(path: str, *, drafting: bool = True) -> Unrolled:
    if Path(path).is_dir() and (Path(path) / "checkpoints").exists():
        model = merge(*load_model(path)[:2])
    else:
        model = load_pretrained(path)
    return unroll(model, drafting=drafting and model.settings.num_heads > 1)


def grid(weights: Unrolled, *, new: int) -> None:
    """Latency to the first token, ms, and tokens/s of the whole call; medians of 3 after a first call that compiles."""
    kinds = [False, True] if weights.drafts else [False]
    print(f"{'rows':>5}{'prompt':>8}{'first token, ms':>17}" + "".join(f"{name:>20}" for name in ("tokens/s", "speculative")))
    for rows in (1, 4, 16):
        for length in (16, 128, 512):
            prompts = np.random.default_rng(0).integers(0, weights.settings.vocabulary_size, (rows, length))
            call = functools.partial(generate, weights, list(prompts), batch_size=rows)
            first = median_seconds(functools.partial(call, max_new_tokens=1))
            rates = [
                rows * new / median_seconds(functools.partial(call, max_new_tokens=new, speculative=kind)) for kind in kinds
            ]
            print(f"{rows:>5}{length:>8}{1000 * first:>17.1f}" + "".join(f"{rate:>20.1f}" for rate in rates), flush=True)


def median_seconds(call) -> float:
    call()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


# ---- heads as draft --------------------------------------------------------------------------------------------------


def speculative(path: str, *, pairs: int, new: int) -> None:
    """A run's model on this project's source: greedy and at temperature 0.7, one row and eight."""
    weights, tokenizer = open_model(path), load_tokenizer(Path(path) / "tokenizer")
    texts = [tokenizer.encode(file.read_text())[200:232] for file in sorted(SOURCE.glob("*.py"))]
    prompts = [text for text in texts if len(text) == 32][:8]
    for temperature in (0.0, 0.7):
        for rows in (1, 8):
            compare(f"temperature {temperature}, {rows} rows", weights, prompts, new, temperature, rows=rows, pairs=pairs)


def memorised(kind: str, *, pairs: int, layers: int, width: int) -> None:
    """A model that knows one text of 256 random tokens by heart, so that nearly all drafts are right."""
    settings = ModelSettings(
        vocabulary_size=1024, width=width, layers=layers, attention_heads=width // 32, kv_heads=width // 32, head_dim=32,
        mlp_width=width * 11 // 4, max_positions=256, num_heads=4, head_kind=kind,
    )  # fmt: skip
    text = np.random.default_rng(0).integers(0, 1024, (1, 256), dtype=np.int32)
    batch = make_batch({"tokens": text, "segment_ids": np.ones_like(text)}, num_heads=4)
    definition, parameters = initial_parameters(settings, 0)
    optimizer = optax.adamw(0.256 / width)
    state = initial_state(parameters, optimizer)
    step = jax.jit(functools.partial(train_step, definition=definition, optimizer=optimizer, objective=Objective(Weighting())))
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    steps, loss = 0, np.inf
    while loss > 0.01 and steps < 300:
        state, metrics = step(state, batch, None)
        steps, loss = steps + 1, float(metrics.loss)
    weights = unroll(merge(definition, state.parameters), drafting=True)
    right = np.array_equal(generate(weights, [text[0, :8]], max_new_tokens=240).tokens[0], text[0, 8:248])
    count = sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
    print(f"{kind}, {layers} layers of width {width}, {count / 1e6:.2f}M parameters: loss {loss:.4f} after {steps} steps, "
          f"the text is reproduced: {right}", flush=True)  # fmt: skip
    compare(f"{kind}, greedy, 1 row", weights, [text[0, :8]], 240, 0.0, rows=1, pairs=pairs)


def products() -> None:
    """What reading four tokens costs beside reading one: products of 1 and 4 rows with the matrices of a layer's mlp."""
    for width in (128, 256, 512):
        wide = width * 11 // 4
        up, down = (jnp.full(shape, 1 / wide, jnp.float32) for shape in ((width, wide), (wide, width)))
        count = 10_000_000 // (width * wide)

        @jax.jit
        def chain(x, up, down, count=count):
            return jax.lax.fori_loop(0, count, lambda _, x: (x @ up) @ down, x)

        times: dict[int, list[float]] = {1: [], 4: []}
        for repeat in range(-1, 21):  # the first compiles
            for rows in times:
                began = time.perf_counter()
                chain(jnp.ones((rows, width)), up, down).block_until_ready()
                if repeat >= 0:
                    times[rows].append((time.perf_counter() - began) / count / 2)
        one, four = (1e6 * statistics.median(column) for column in times.values())
        ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
        print(f"{width} x {wide}, {4 * width * wide / 1e6:.2f} MB: {one:.1f} us with 1 row, {four:.1f} with 4, ratio {ratio:.2f}",
              flush=True)  # fmt: skip


def compare(name: str, weights: Unrolled, prompts, new: int, temperature: float, *, rows: int, pairs: int) -> None:
    """Ordinary and speculative calls in turn; prints tokens a pass, acceptance by depth and the median ratio of seconds."""

    def call(speculative: bool) -> tuple[float, Generation]:
        began = time.perf_counter()
        got = generate(
            weights, prompts, max_new_tokens=new, temperature=temperature, speculative=speculative, batch_size=rows
        )
        return time.perf_counter() - began, got

    call(False), call(True)
    ratios, rates = [], []
    for _ in range(pairs):
        (ordinary, plain), (drafted, got) = call(False), call(True)
        ratios.append(ordinary / drafted)
        rates.append((plain.statistics.new_tokens / ordinary, got.statistics.new_tokens / drafted))
    same = all(np.array_equal(a, b) for a, b in zip(plain.tokens, got.tokens, strict=True))
    plain_rate, rate = (statistics.median(column) for column in zip(*rates, strict=True))
    acceptance = ", ".join(f"{share:.3f}" for share in got.statistics.acceptance)
    print(f"{name}: {got.statistics.tokens_per_pass:.2f} tokens a pass, kept by depth {acceptance}; {plain_rate:.0f} and "
          f"{rate:.0f} tokens/s, ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
          + (f", equal output: {same}" if not temperature else ""), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
