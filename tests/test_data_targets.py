import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp_jax.data.targets import positions, shift_targets


def literal(tokens, segment_ids, num_heads, loss_mask=None):
    """The definition, one element at a time."""
    rows, length = tokens.shape
    targets = np.zeros((rows, length, num_heads), np.int32)
    mask = np.zeros((rows, length, num_heads), bool)
    for b in range(rows):
        for s in range(length):
            for k in range(num_heads):
                t = s + 1 + k
                if t >= length:
                    continue
                targets[b, s, k] = tokens[b, t]
                allowed = segment_ids[b, t] != 0 and (loss_mask is None or loss_mask[b, t] != 0)
                mask[b, s, k] = segment_ids[b, t] == segment_ids[b, s] and allowed
    return targets, mask


def test_the_worked_example_of_the_design():
    tokens = np.array([[10, 11, 12, 20, 21, 22, 23, 24]])
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 2]])
    targets, mask = shift_targets(tokens, segments, num_heads=2)
    assert targets.dtype == np.int32 and mask.dtype == bool and targets.shape == mask.shape == (1, 8, 2)
    np.testing.assert_array_equal(mask[0, :, 0], [1, 1, 0, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(mask[0, :, 1], [1, 0, 0, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(targets[0, :, 0], [11, 12, 20, 21, 22, 23, 24, 0])
    np.testing.assert_array_equal(targets[0, :, 1], [12, 20, 21, 22, 23, 24, 0, 0])


def test_padding_is_no_target_and_has_none():
    targets, mask = shift_targets(np.array([[5, 6, 7, 9, 9]]), np.array([[1, 1, 2, 0, 0]]), num_heads=3)
    assert mask.sum() == 1 and mask[0, 0, 0]
    np.testing.assert_array_equal(targets[0], [[6, 7, 9], [7, 9, 9], [9, 9, 0], [9, 0, 0], [0, 0, 0]])


def test_loss_mask_is_about_the_target_not_the_position():
    prompt_then_answer = np.array([[0, 0, 0, 1, 1]])
    _, mask = shift_targets(
        np.array([[1, 2, 3, 4, 5]]), np.ones((1, 5), int), num_heads=2, loss_mask=prompt_then_answer
    )
    np.testing.assert_array_equal(mask[0, :, 0], [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(mask[0, :, 1], [0, 1, 1, 0, 0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (2, 7), (3, 16)]), st.sampled_from([1, 2, 4, 9]))
def test_equals_the_literal_loops(seed, shape, num_heads):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50, shape)
    segments = np.sort(rng.integers(0, 4, shape), axis=1)[:, ::-1]
    loss_mask = rng.choice([0.0, 0.25, 1.0], shape) if seed % 2 else None
    for actual, expected in zip(
        shift_targets(tokens, segments, num_heads=num_heads, loss_mask=loss_mask),
        literal(tokens, segments, num_heads, loss_mask),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="segment_ids"):
        shift_targets(np.zeros((1, 4), int), np.zeros((1, 5), int), num_heads=1)
    with pytest.raises(ValueError, match="loss_mask"):
        shift_targets(np.zeros((1, 4), int), np.zeros((1, 4), int), num_heads=1, loss_mask=np.ones(4))
    with pytest.raises(ValueError, match="num_heads"):
        shift_targets(np.zeros((1, 4), int), np.zeros((1, 4), int), num_heads=0)


def test_positions_restart_in_every_segment():
    actual = positions(np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]))
    assert actual.dtype == np.int32
    np.testing.assert_array_equal(actual, [[0, 1, 2, 0, 1, 0, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7]])
