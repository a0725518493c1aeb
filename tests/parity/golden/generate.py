"""Writes the golden vectors beside this file: `python tests/parity/golden/generate.py`.

Every expected value is worked out here by hand, in exact numbers where they are exact; no code of either backend is
used. Fractions are written as fractions, so that a reader can check them with pencil and paper.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction as F
from pathlib import Path

HERE = Path(__file__).parent


def case(function, why, arrays, expected, **hyperparameters):
    return {
        "function": function,
        "why": why,
        "arrays": arrays,
        "hyperparameters": hyperparameters,
        "expected": _numbers(expected),
    }


def _numbers(x):
    return [_numbers(y) for y in x] if isinstance(x, list) else float(x)


def column(*entries):
    """`[S, 1]`: one head."""
    return [[entry] for entry in entries]


# Two documents in one row of eight, and what depends on the edge between t = 2 and t = 3.
SEGMENTS = [1, 1, 1, 2, 2, 2, 2, 2]
VALUES = [1.0, 2.0, 4.0, 3.0, 3.0, 5.0, 5.0, 8.0]
REWARDS = [0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 2.0]
# Head 1 predicts two ahead, so position 1 has no target there: s + 2 = 3 lies in the next document.
MASK = [[1, 1], [1, 0], [0, 0], [1, 1], [1, 1], [1, 1], [1, 0], [0, 0]]


def segments():
    # r[t] + V[t+1] / 2 - V[t]; V[t+1] = 0 at t = 2 and t = 7.
    error = [F(0), F(0), F(-3), F(-3, 2), F(-1, 2), F(-5, 2), F(-1), F(-6)]
    # From the right, A[t] = td[t] + A[t+1] / 4:
    #   A7 = -6, A6 = -1 - 6/4 = -5/2, A5 = -5/2 - 5/8 = -25/8, A4 = -1/2 - 25/32 = -41/32, A3 = -3/2 - 41/128 = -233/128,
    #   and anew A2 = -3, A1 = 0 - 3/4, A0 = 0 - 3/16.
    advantage = [F(-3, 16), F(-3, 4), F(-3), F(-233, 128), F(-41, 32), F(-25, 8), F(-5, 2), F(-6)]
    return [
        case(
            "value_change",
            "V[t] - V[t-1] / 2, where V[t-1] counts as 0 at t = 0 and t = 3",
            [VALUES, SEGMENTS],
            [F(1), F(3, 2), F(3), F(3), F(3, 2), F(7, 2), F(5, 2), F(11, 2)],
            discount=0.5,
        ),
        case("td_error", "the list above", [REWARDS, VALUES, SEGMENTS], error, discount=0.5),
        case(
            "generalized_advantage",
            "the recurrence above, discount * decay = 1/4",
            [REWARDS, VALUES, SEGMENTS],
            advantage,
            discount=0.5,
            decay=0.5,
        ),
        case(
            "token_advantage",
            "one to the right, 0 at t = 0 and t = 3",
            [[float(a) for a in advantage], SEGMENTS],
            [0, *advantage[:2], 0, *advantage[3:7]],
        ),
        case(
            "align_to_heads",
            "out[s, k] = values[s + 1 + k]",
            [VALUES],
            [[2, 4], [4, 3], [3, 3], [3, 5], [5, 5], [5, 8], [8, 0], [0, 0]],
            num_heads=2,
        ),
        case("uniform", "1 where there is a target", [MASK], MASK),
        case(
            "head_decay",
            "6 targets of weight 1 and 4 of weight 1/2 have mean 8/10: 1 / 0.8 and 0.5 / 0.8",
            [MASK],
            [[F(5, 4) * a, F(5, 8) * b] for a, b in MASK],
            decay=0.5,
            scope="batch",
        ),
        case(
            "head_decay",
            "(1, 1/2) has mean 3/4: 4/3 and 2/3; a head alone has weight 1",
            [MASK],
            [[F(4, 3) if b else a, F(2, 3) * b] for a, b in MASK],
            decay=0.5,
            scope="position",
        ),
    ]


def advantages():
    # Published: the test of truncated_generalized_advantage_estimation in google-deepmind/rlax (rlax/_src/multistep_test.py).
    # There the last value bootstraps; here it is one more step with reward = value, whose own advantage is 0. The second
    # row's discounts (0.9, 0.9, 0.9, 0, 0.9) are a segment edge after t = 3.
    published = {
        0.99: {
            1.0: [-1.45118, -4.4557, 2.5396, 0.5249, -0.49],
            0.7: [-0.676979, -5.248167, 2.4846, 0.6704, -0.49],
            0.4: [0.56731, -6.042, 2.3431, 0.815, -0.49],
        },
        0.9: {1.0: [3.0, 2.0, 1.0, 0.0, -4.9], 0.7: [2.2899, 1.73, 1.0, 0.0, -4.9], 0.4: [1.725, 1.46, 1.0, 0.0, -4.9]},
    }
    rows = {
        0.99: ([0.0, 0.0, 1.0, 0.0, -0.5, -1.0], [1.0, 4.0, -3.0, -2.0, -1.0, -1.0], [7, 7, 7, 7, 7, 7]),
        0.9: ([0.0, 0.0, 0.0, 0.0, 1.0, -1.0], [-3.0, -2.0, -1.0, 0.0, 5.0, -1.0], [7, 7, 7, 7, 8, 8]),
    }
    return [
        # They hold the published numbers to 1e-3, the digits they printed.
        {**case("generalized_advantage", "rlax", list(rows[d]), [*a, 0.0], discount=d, decay=decay), "tolerance": 1e-3}
        for d, by_decay in published.items()
        for decay, a in by_decay.items()
    ]


def scores():
    root = math.sqrt(3)
    return [
        case(
            "group_advantage",
            "A_i = (r_i - mean) / std, DeepSeekMath, arXiv 2402.03300: (1, 0, 0, 1) has mean 1/2 and std 1/2",
            [[1.0, 0.0, 0.0, 1.0]],
            [1, -1, -1, 1],
            epsilon=0.0,
        ),
        case(
            "group_advantage",
            "(1, 0, 0, 0) has mean 1/4 and variance 1/4 - 1/16 = 3/16: (3/4) / (sqrt(3)/4) and (-1/4) / (sqrt(3)/4)",
            [[1.0, 0.0, 0.0, 0.0]],
            [root, -1 / root, -1 / root, -1 / root],
            epsilon=0.0,
        ),
        case("group_advantage", "epsilon adds to the std: 0.5 / (0.5 + 0.5)", [[3.0, 2.0]], [0.5, -0.5], epsilon=0.5),
        case("group_advantage", "nothing to prefer", [[0.1, 0.1, 0.1]], [0, 0, 0]),
        case("excess_loss", "by subtraction", [[3.0, 1.0, 2.0], [1.0, 2.5, 2.0]], [2, F(-3, 2), 0]),
        case("excess_loss", "magnitudes", [[3.0, 1.0, 2.0], [1.0, 2.5, 2.0]], [2, F(3, 2), 0], signed=False),
        case(
            "excess_loss",
            "1/2 is smaller than 1, 1 is not",
            [[3.0, 1.5, 1.0], [1.0, 2.0, 2.0]],
            [2, 0, -1],
            threshold=1.0,
        ),
        case(
            "logit_gradient_norm",
            "p = (1/2, 1/4, 1/4), y = 0: the gradient (-1/2, 1/4, 1/4) has squared length 3/8; p_y = 1 has none",
            [[0.5, 1.0], [0.375, 1.0]],
            [math.sqrt(0.375), 0],
        ),
    ]


def weights():
    pair = [[1, 1]]
    return [
        case(
            "softmax_over_heads",
            "softmax(0, ln 3) = (1/4, 3/4), times 2",
            [[[0.0, math.log(3)]], pair],
            [[F(1, 2), F(3, 2)]],
            temperature=1.0,
        ),
        case(
            "softmax_over_heads",
            "exponents doubled: (1/10, 9/10), times 2",
            [[[0.0, math.log(3)]], pair],
            [[F(1, 5), F(9, 5)]],
            temperature=0.5,
        ),
        case(
            "exponential",
            "(5, 3) standardises to (1, -1); e / ((e + 1/e) / 2) = 1 + tanh 1 (AWR's exp(advantage / temperature))",
            [column(5.0, 3.0), column(1, 1)],
            column(1 + math.tanh(1), 1 - math.tanh(1)),
            temperature=1.0,
            low=0.0,
            high=10.0,
            scope="batch",
        ),
        case(
            "exponential",
            "e is clipped to 2 and 1/e to 1/2, whose mean is 5/4",
            [column(5.0, 3.0), column(1, 1)],
            column(F(8, 5), F(2, 5)),
            temperature=1.0,
            low=0.5,
            high=2.0,
            scope="head",
        ),
        case(
            "exponential",
            "the mask hides the 9; equal scores standardise to 0, and exp(0) = 1 has mean one",
            [[[2.0, 2.0], [9.0, 2.0]], [[1, 1], [0, 1]]],
            [[1, 1], [0, 1]],
            temperature=1.0,
            low=0.1,
            high=3.0,
            scope="batch",
        ),
        case(
            "top_fraction",
            "ceil(0.4 * 5) = 2 of 5; three entries tie at 3 and the first two win",
            [column(3.0, 1.0, 3.0, 2.0, 3.0), column(1, 1, 1, 1, 1)],
            column(F(5, 2), 0, F(5, 2), 0, 0),
            fraction=0.4,
            scope="head",
        ),
        case(
            "top_fraction",
            "7 of 100, though 0.07 * 100 is 7.000000000000001 in floating point",
            [column(*[float(i) for i in range(100)]), column(*[1] * 100)],
            column(*[0] * 93, *[F(100, 7)] * 7),
            fraction=0.07,
            scope="batch",
        ),
        case(
            "top_fraction",
            "each head by itself: ceil(0.5 * 3) = 2 of 3 on the left, ceil(0.5 * 1) = 1 of 1 on the right",
            [[[1.0, 0.0], [3.0, 9.0], [2.0, 0.0]], [[1, 0], [1, 1], [1, 0]]],
            [[0, 0], [F(3, 2), 1], [F(3, 2), 0]],
            fraction=0.5,
            scope="head",
        ),
        case(
            "confidence",
            "probabilities 1/2 and 1/4 have mean 3/8",
            [column(math.log(2), math.log(4)), column(1, 1)],
            column(F(4, 3), F(2, 3)),
            scope="sequence",
        ),
        case(
            "focal",
            "(1/2)^2 and (3/4)^2 have mean 13/32",
            [column(math.log(2), math.log(4)), column(1, 1)],
            column(F(8, 13), F(18, 13)),
            gamma=2.0,
            scope="sequence",
        ),
        case("entropy", "(1, 3) has mean 2", [column(1.0, 3.0), column(1, 1)], column(F(1, 2), F(3, 2)), scope="batch"),
        case(
            "combine",
            "sqrt(1 * 4) twice",
            [[column(1.0, 4.0), column(4.0, 1.0)], column(1, 1)],
            column(1, 1),
            coefficients=[1.0, 1.0],
            scope="batch",
        ),
        case(
            "combine",
            "1^(3/4) 4^(1/4) and 4^(3/4) 1^(1/4) are as 1 to 2",
            [[column(1.0, 4.0), column(4.0, 1.0)], column(1, 1)],
            column(F(2, 3), F(4, 3)),
            coefficients=[3.0, 1.0],
            scope="batch",
        ),
        case(
            "permute",
            "valid noise by rank: entry 1 (0.1), entry 3 (0.2), entry 0 (0.3); their weights go to entries 0, 1 and 3",
            [column(1.0, 2.0, 3.0, 4.0), column(1, 1, 0, 1), column(0.3, 0.1, 0.0, 0.2)],
            column(2, 4, 0, 1),
        ),
        case(
            "normalize",
            "(1, 3) has mean 2, the 5 is masked",
            [column(1.0, 3.0, 5.0), column(1, 1, 0)],
            column(F(1, 2), F(3, 2), 0),
            scope="head",
        ),
        case(
            "entropy",
            "rounding left one below 0, where it counts as 0: (0, 1, 2) has mean 1",
            [column(-1e-3, 1.0, 2.0), column(1, 1, 1)],
            column(0, 1, 2),
            scope="batch",
        ),
        case(
            "focal",
            "so does a loss: 1 - exp(0) = 0 beside 1/2, whose root has half its value as mean",
            [column(-1e-3, math.log(2)), column(1, 1)],
            column(0, 2),
            gamma=0.5,
            scope="head",
        ),
        case(
            "normalize",
            "a head whose weights are all 0 becomes uniform",
            [[[0.0, 2.0], [0.0, 6.0]], [[1, 1], [1, 1]]],
            [[1, F(1, 2)], [1, F(3, 2)]],
            scope="head",
        ),
        case(
            "effective_sample_fraction", "(1 + 3)^2 / (2 * (1 + 9))", [column(1.0, 3.0, 7.0), column(1, 1, 0)], F(4, 5)
        ),
        case(
            "weight_entropy",
            "a full, an empty and a single-headed position: (1 + 0) / 2; the single one doesn't count",
            [[[1.0, 1.0], [2.0, 0.0], [1.0, 5.0]], [[1, 1], [1, 1], [1, 0]]],
            F(1, 2),
        ),
        case(
            "weight_entropy",
            "(1/4, 3/4) has entropy ln(4)/4 + 3/4 (ln 4 - ln 3) = ln 4 - 3/4 ln 3, over ln 2",
            [[[1.0, 3.0]], pair],
            (math.log(4) - 0.75 * math.log(3)) / math.log(2),
        ),
    ]


FILES = {"segments.json": segments, "advantages.json": advantages, "scores.json": scores, "weights.json": weights}


def text(name):
    lines = ",\n".join(json.dumps(entry) for entry in FILES[name]())
    return f"[\n{lines}\n]\n"


if __name__ == "__main__":
    for name in FILES:
        (HERE / name).write_text(text(name))
