"""Metrics of one mask and the structure loss, against values by hand and slow code that follows the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logit

from benchmarks.segmentation.metrics import METRICS, image_metrics
from benchmarks.segmentation.task_loss import structure_loss

INDEPENDENT_OF_PLACE = ("e_adaptive", "e_mean", "jaccard", "dice", "iou")


def metrics(logits, mask: np.ndarray, size: tuple[int, int] | None = None) -> dict[str, float]:
    """Return the metrics of an image of ``size`` in the top left corner of the input; all of it if left out."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    height, width = size or logits.shape
    inside = torch.zeros(logits.shape)
    inside[:height, :width] = 1
    return image_metrics(logits, inside, mask)


def grey_case(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a mask, grey values that roughly follow it, 0 and 255 among them, and logits of these grey values."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    mask = np.hypot(rows / height - rng.uniform(0.3, 0.7), columns / width - rng.uniform(0.3, 0.7)) < 0.3
    grey = np.clip(np.where(mask, 230, 25) + rng.normal(0, 60, mask.shape), 0, 255).round()
    return mask, grey, logit(grey / 255).clip(-30, 30)


# references


def s_measure_by_hand(p: np.ndarray, mask: np.ndarray) -> float:
    """Return Fan et al. 2017, with alpha = 1/2, of a mask with foreground and background."""

    def similarity_of_values(values: np.ndarray) -> float:
        mean = values.mean()
        return 2 * mean / (mean**2 + 1 + values.std(ddof=1))

    share = mask.mean()
    of_objects = share * similarity_of_values(p[mask]) + (1 - share) * similarity_of_values(1 - p[~mask])
    row = round(float(np.arange(len(mask)) @ mask.sum(1) / mask.sum())) + 1
    column = round(float(np.arange(mask.shape[1]) @ mask.sum(0) / mask.sum())) + 1
    of_regions = 0.0
    for of_rows in (slice(None, row), slice(row, None)):
        for of_columns in (slice(None, column), slice(column, None)):
            x, y = p[of_rows, of_columns], mask[of_rows, of_columns].astype(float)
            if x.size:
                covariance = np.cov(x.ravel(), y.ravel()) if x.size > 1 else np.zeros((2, 2))
                above = 4 * x.mean() * y.mean() * covariance[0, 1]
                below = (x.mean() ** 2 + y.mean() ** 2) * (covariance[0, 0] + covariance[1, 1])
                of_regions += x.size / p.size * (1.0 if above == below == 0 else above / below if above else 0.0)
    return max(0.0, 0.5 * of_objects + 0.5 * of_regions)


def e_measure_by_hand(foreground: np.ndarray, mask: np.ndarray) -> float:
    """Return Fan et al. 2018 of a binary map, divided by one pixel less than there are, as in its code."""
    if mask.all():
        return foreground.sum() / (mask.size - 1)
    a, b = foreground - foreground.mean(), mask - mask.mean()
    alignment = 2 * a * b / (a**2 + b**2)
    return ((alignment + 1) ** 2 / 4).sum() / (mask.size - 1)


def weighted_f_by_hand(p: np.ndarray, mask: np.ndarray, beta_squared: float) -> float:
    """Return Margolin et al. 2014, pixel by pixel; no two pixels of the mask may be nearest to the same one."""
    error = abs(p - mask)
    inner = np.argwhere(mask)
    spread, distance = error.copy(), np.zeros(mask.shape)
    for row, column in np.argwhere(~mask):
        squares = np.square(inner - (row, column)).sum(1)
        distance[row, column] = math.sqrt(squares.min())
        spread[row, column] = error[tuple(inner[squares.argmin()])]
    offsets = range(-3, 4)
    weight = {(y, x): math.exp(-(y * y + x * x) / 50) for y in offsets for x in offsets}
    padded = np.pad(spread, 3)
    smooth = np.zeros(mask.shape)
    for (y, x), value in weight.items():
        smooth += value / sum(weight.values()) * padded[3 + y : 3 + y + len(mask), 3 + x : 3 + x + mask.shape[1]]
    dependent = np.where(mask, np.minimum(error, smooth), error)
    importance = np.where(mask, 1, 2 - 0.5 ** (distance / 5))
    hits, false_alarms = (1 - dependent[mask]).sum(), (dependent * importance)[~mask].sum()
    recall, precision = hits / mask.sum(), hits / (hits + false_alarms)
    return (1 + beta_squared) * recall * precision / (recall + beta_squared * precision)


def resized_by_hand(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return values between the centres of pixels, constant beyond the outermost."""

    def weights(n_in: int, n_out: int) -> np.ndarray:
        centres = ((np.arange(n_out) + 0.5) * n_in / n_out - 0.5).clip(0, n_in - 1)
        return np.clip(1 - abs(centres[:, None] - np.arange(n_in)), 0, None)

    return weights(values.shape[0], height) @ values @ weights(values.shape[1], width).T


# values by hand


def test_the_names_come_in_order():
    assert METRICS == ("s_measure", "e_adaptive", "e_mean", "wf", "wf_03", "jaccard", "dice", "iou")
    assert tuple(metrics(np.zeros((2, 3)), np.ones((2, 3), bool))) == METRICS


def test_overlaps_of_four_pixels():
    mask = np.array([[True, True], [False, False]])
    found = metrics([[0.2, 0.6], [-1, 2]], mask)
    assert found["jaccard"] == pytest.approx(2 / 3)
    assert found["dice"] == pytest.approx(4 / 5)
    # At .1, then .3 and .5, then .7 and .9; of probabilities it would be (2/4 + 2/4 + 2/3 + 0 + 0) / 5.
    assert found["iou"] == pytest.approx((2 / 3 + 1 / 3 + 1 / 3 + 0 + 0) / 5)
    assert metrics([[-9, 0], [9, 9]], mask)["jaccard"] == 0


@pytest.mark.parametrize("level", [51, 153, 255])
def test_weighted_f_of_a_faint_but_exact_mask(level):
    # Far from the border the smoothed error is the error: recall p, precision 1.
    mask = np.zeros((20, 24), bool)
    mask[6:14, 5:18] = True
    p = level / 255
    found = metrics(np.where(mask, logit(p).clip(max=30), -30), mask)
    assert found["wf"] == pytest.approx(2 * p / (1 + p), abs=1e-9)
    assert found["wf_03"] == pytest.approx(1.3 * p / (p + 0.3), abs=1e-9)


@pytest.mark.parametrize(("everywhere", "share"), [(-10.0, 0), (10.0, 0.09)])
def test_a_prediction_of_nothing_or_everything_is_not_stretched(everywhere, share):
    # Stretched to 0..1, the faint difference would be a perfect mask.
    mask = np.zeros((20, 20), bool)
    mask[6:12, 7:13] = True
    found = metrics(np.where(mask, everywhere + 0.5, everywhere), mask)
    assert found["jaccard"] == found["iou"] == share
    assert found["dice"] == pytest.approx(2 * share / (1 + share))
    assert found["s_measure"] == pytest.approx(0.5 * (0.09 if share else 0.91))
    for name in ("e_adaptive", "e_mean"):
        assert found[name] == pytest.approx(0.25 * 400 / 399)
    for name in ("wf", "wf_03"):
        assert 0.03 < found[name] < 0.2 if share else found[name] == 0


def test_a_faint_difference_between_confident_pixels_is_not_stretched():
    mask = np.zeros((20, 20), bool)
    mask[6:12, 7:13] = True
    found = metrics(np.where(mask, 3.0, 2.5), mask)
    # Twice the mean is above 1, and no probability is.
    assert found["e_adaptive"] == pytest.approx(0.25 * 400 / 399)
    assert found["wf"] < 0.2


@pytest.mark.parametrize("rows", [slice(4, 16), slice(1, 19), slice(0, 20)], ids=["small", "most", "high"])
def test_a_perfect_prediction_has_all_the_measures_give(rows):
    mask = np.zeros((20, 20), bool)
    mask[rows, 3:19] = True
    found = metrics(np.where(mask, 10, -10), mask)
    for name in METRICS:
        expected = (255 + 0.25) / 256 * 400 / 399 if name == "e_mean" else 1
        assert found[name] == pytest.approx(expected, abs=1e-12), name


def test_a_full_mask_is_judged_too():
    assert all(value == pytest.approx(1) for value in metrics(np.full((9, 9), 20.0), np.ones((9, 9), bool)).values())
    nothing = metrics(np.full((9, 9), -20.0), np.ones((9, 9), bool))
    assert all(nothing[name] == 0 for name in METRICS if not name.startswith(("wf", "e_")))


# against slow code


@pytest.mark.parametrize("seed", range(6))
def test_structure_and_alignment_are_those_of_the_papers(seed):
    mask, grey, logits = grey_case(17 + seed, 23 - seed, seed)
    found = metrics(logits, mask)
    p = grey / 255
    assert found["s_measure"] == pytest.approx(s_measure_by_hand(p, mask), abs=1e-9)
    adaptive = p >= min(2 * p.mean(), 1)
    assert found["e_adaptive"] == pytest.approx(e_measure_by_hand(adaptive, mask), abs=1e-9)
    curve = [e_measure_by_hand(grey >= threshold, mask) for threshold in range(256)]
    assert found["e_mean"] == pytest.approx(np.mean(curve), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_weighted_f_is_that_of_the_paper(seed):
    mask, grey, logits = grey_case(21, 18, seed)
    # One error in all of the mask, so that it does not matter which of several nearest pixels is taken.
    grey[mask], logits[mask] = 204, logit(0.8)
    found = metrics(logits, mask)
    assert found["wf"] == pytest.approx(weighted_f_by_hand(grey / 255, mask, 1), abs=1e-9)
    assert found["wf_03"] == pytest.approx(weighted_f_by_hand(grey / 255, mask, 0.3), abs=1e-9)
    assert abs(found["wf"] - found["wf_03"]) > 0.01


@pytest.mark.parametrize("where", [np.s_[:, -1], np.s_[-1, :], np.s_[-1:, -1:], np.s_[:, -2:]])
def test_a_mask_at_the_far_border_has_a_structure(where):
    mask = np.zeros((8, 9), bool)
    mask[where] = True
    grey = np.random.default_rng(0).integers(1, 255, mask.shape)
    if mask.sum() == 1:
        # The deviation of one value is 0.
        assert 0 < metrics(logit(grey / 255), mask)["s_measure"] < 1
    else:
        assert metrics(logit(grey / 255), mask)["s_measure"] == pytest.approx(s_measure_by_hand(grey / 255, mask))


@pytest.mark.parametrize("size", [(36, 48), (12, 15), (24, 24), (50, 31)])
def test_logits_are_resized_to_the_mask_and_padding_has_no_influence(size):
    rng = np.random.default_rng(1)
    of_image = rng.normal(0, 2, (24, 30))
    mask = resized_by_hand(of_image, *size) + rng.normal(0, 2, size) > 1
    resized = resized_by_hand(of_image, *size)
    logits = np.full((32, 32), math.nan)
    logits[:24, :30] = of_image
    found = metrics(logits, mask, (24, 30))
    cuts = [((resized > t) & mask).sum() / ((resized > t) | mask).sum() for t in (0, 0.1, 0.3, 0.5, 0.7, 0.9)]
    assert found["jaccard"] == pytest.approx(cuts[0])
    assert found["iou"] == pytest.approx(np.mean(cuts[1:]))
    assert found["dice"] == pytest.approx(2 * ((resized > 0) & mask).sum() / ((resized > 0).sum() + mask.sum()))
    p = (255 / (1 + np.exp(-resized))).round() / 255
    assert found["s_measure"] == pytest.approx(s_measure_by_hand(p, mask), abs=1e-4)
    logits[24:], logits[:, 30:] = 30, -30
    assert metrics(logits, mask, (24, 30)) == found
    assert metrics(of_image, mask) == found


# laws


@st.composite
def predictions(draw) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and a mask with foreground, of up to 8 x 8 pixels, many of them at the ends."""
    height, width = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    mask = rng.random((height, width)) < draw(st.sampled_from([0.1, 0.5, 0.9, 1]))
    mask[rng.integers(height), rng.integers(width)] = True
    logits = rng.normal(draw(st.floats(-20, 20)), draw(st.sampled_from([0, 1, 30])), mask.shape)
    return logits, mask


@given(predictions())
def test_all_metrics_are_finite_and_in_range(case):
    logits, mask = case
    found = metrics(logits, mask)
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in found.values())
    hits = ((logits > 0) & mask).sum()
    assert found["dice"] == pytest.approx(2 * hits / ((logits > 0).sum() + mask.sum()))
    assert found["dice"] == pytest.approx(2 * found["jaccard"] / (1 + found["jaccard"]))


@given(predictions(), st.sampled_from([(0,), (1,), (0, 1)]))
def test_flips_leave_what_has_no_place_alike(case, axes):
    logits, mask = case
    found, flipped = metrics(logits, mask), metrics(np.flip(logits, axes).copy(), np.flip(mask, axes))
    for name in INDEPENDENT_OF_PLACE:
        assert flipped[name] == pytest.approx(found[name], abs=1e-12)


@given(predictions())
def test_exchanged_axes_leave_the_structure_alike(case):
    logits, mask = case
    assert metrics(logits.T.copy(), mask.T)["s_measure"] == pytest.approx(metrics(logits, mask)["s_measure"], abs=1e-9)


def test_flips_hardly_change_structure_and_weighted_f():
    # Both round: one to the pixel of the centre, the other to one of several nearest pixels.
    mask, _, logits = grey_case(61, 73, 3)
    found, flipped = metrics(logits, mask), metrics(np.flip(logits).copy(), np.flip(mask))
    for name in ("s_measure", "wf", "wf_03"):
        assert flipped[name] == pytest.approx(found[name], abs=0.01)


# refusals


@pytest.mark.parametrize(
    ("logits", "inside", "mask", "error", "pattern"),
    [
        ((1, 4, 4), (1, 4, 4), np.ones((4, 4), bool), ValueError, r"inside must have the shape \[S, S\] of logits"),
        ((4, 4), (1, 4, 4), np.ones((4, 4), bool), ValueError, r"inside must .*, got \(1, 4, 4\) and \(4, 4\); pass"),
        ((4, 4), (4, 4), np.ones((4, 4)), TypeError, "mask must be bool, got float64; compare it with its threshold"),
        ((4, 4), (4, 4), np.zeros((4, 5), bool), ValueError, r"mask must be \[H, W\] with foreground, got \(4, 5\);"),
        ((4, 4), (4, 4), np.ones((1, 4, 4), bool), ValueError, r"mask must be \[H, W\] with foreground, got \(1, 4, 4"),
    ],
)
def test_what_does_not_fit_is_refused(logits, inside, mask, error, pattern):
    with pytest.raises(error, match=f"image_metrics: {pattern}"):
        image_metrics(torch.zeros(logits), torch.ones(inside), mask)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prediction_that_is_not_finite_is_refused(value):
    logits = np.zeros((4, 4))
    logits[2, 1] = value
    with pytest.raises(ValueError, match="image_metrics: logits must be finite, got NaN or inf; lower the learning"):
        metrics(logits, np.ones((4, 4), bool))


# the structure loss


def structure_loss_by_hand(logits, masks, sizes, window: int) -> torch.Tensor:
    """Return the loss of the images by themselves, pixel by pixel, each mask's own and then their mean."""
    losses = []
    for image, (height, width) in enumerate(sizes):
        for x, mask in zip(logits[image], masks[image], strict=True):
            total = cross_entropy = overlap = union = 0
            for row in range(height):
                for column in range(width):
                    reach = window // 2
                    near = mask[:height, :width][
                        max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1
                    ]
                    true = mask[row, column].item()
                    weight = 1 + 5 * abs(near.sum().item() / window**2 - true)
                    p = 1 / (1 + torch.exp(-x[row, column]))
                    total += weight
                    cross_entropy = cross_entropy - weight * torch.log(p if true else 1 - p)
                    overlap = overlap + weight * p * true
                    union = union + weight * (p + true - p * true)
            losses.append(cross_entropy / total + 1 - (overlap + 1) / (union + 1))
    return sum(losses) / len(losses)


def loss_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Return logits, masks and inside of two images of different sizes with two masks each, 0 in the padding."""
    logits = torch.randn(2, 2, 12, 12, dtype=torch.float64) * 2
    sizes = [(12, 9), (7, 12)]
    inside = torch.zeros(2, 1, 12, 12)
    for image, (height, width) in enumerate(sizes):
        inside[image, :, :height, :width] = 1
    masks = (torch.rand(2, 2, 12, 12) < torch.tensor([0.3, 0.7])[:, None, None]) * inside
    masks[0, 0, 2:8, 3:9] = 1
    return logits, masks, inside, sizes


@pytest.mark.parametrize("window", [1, 5, 31])
def test_value_and_gradient_are_those_of_a_slow_loop(window):
    logits, masks, inside, sizes = loss_case()
    slow = logits.clone().requires_grad_()
    expected = structure_loss_by_hand(slow, masks, sizes, window)
    expected.backward()
    fast = logits.float().requires_grad_()
    loss = structure_loss(fast, masks, inside, window=window)
    (-1.7 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(fast.grad.double(), -1.7 * slow.grad, rtol=1e-4, atol=1e-7)
    if window == 31:
        assert structure_loss(fast, masks, inside).item() == loss.item()


def test_without_foreground_the_loss_has_a_closed_form():
    loss = structure_loss(torch.full((1, 1, 8, 8), 0.3), torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
    p = 1 / (1 + math.exp(-0.3))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.3)) + 1 - 1 / (64 * p + 1), rel=1e-6)


def test_outlines_weigh_more_than_the_rest():
    # As in the papers; with the weights cancelled out of the cross-entropy both errors would cost the same.
    masks = torch.zeros(1, 1, 48, 48)
    masks[..., 24:] = 1
    losses = []
    for column in (0, 23):
        logits = 6 * masks - 3
        logits[..., column] = 3
        losses.append(structure_loss(logits, masks, torch.ones(1, 1, 48, 48), window=9).item())
    assert losses[1] > 1.5 * losses[0]


@pytest.mark.parametrize("junk", [100.0, math.nan, -math.inf])
def test_padding_has_no_influence_on_value_or_gradient(junk):
    logits, masks, inside, _ = loss_case()
    logits = logits.float()
    spoiled = logits.where(inside.bool(), junk).requires_grad_()
    loss = structure_loss(spoiled, masks.where(inside.bool(), 1), inside, window=5)
    loss.backward()
    assert loss.item() == structure_loss(logits, masks, inside, window=5).item()
    assert (spoiled.grad.masked_select(~inside.bool()) == 0).all()
    assert spoiled.grad.masked_select(inside.bool()).isfinite().all()
    alone = structure_loss(logits[:1, :, :, :9], masks[:1, :, :, :9], torch.ones(1, 1, 12, 9), window=5)
    assert structure_loss(logits[:1], masks[:1], inside[:1], window=5).item() == pytest.approx(alone.item(), rel=1e-6)


def test_autocast_and_low_precision_do_not_lower_the_precision():
    logits, masks, inside, _ = loss_case()
    low = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = structure_loss(low, masks.bfloat16(), inside)
    assert loss.dtype == torch.float32
    assert loss.item() == structure_loss(low.float(), masks, inside).item()


@pytest.mark.parametrize(
    ("masks", "inside", "window", "pattern"),
    [
        ((2, 1, 4, 4), (2, 1, 8, 8), 31, r"masks must have the shape \[b, p, S, S\] of logits, got \(2, 1, 4, 4\) and"),
        ((2, 1, 8, 8), (2, 8, 8), 31, r"inside must be \[b, 1, S, S\] for logits .*, got \(2, 8, 8\); take it from"),
        ((2, 1, 8, 8), (1, 1, 8, 8), 31, r"inside must be \[b, 1, S, S\] .*, got \(1, 1, 8, 8\)"),
        ((2, 1, 8, 8), (2, 1, 8, 8), 30, "window must be odd and above 0, got 30; add 1"),
        ((2, 1, 8, 8), (2, 1, 8, 8), -1, "window must be odd and above 0, got -1; add 1"),
    ],
)
def test_shapes_and_windows_that_do_not_fit_are_refused(masks, inside, window, pattern):
    with pytest.raises(ValueError, match=f"structure_loss: {pattern}"):
        structure_loss(torch.zeros(2, 1, 8, 8), torch.zeros(masks), torch.ones(inside), window=window)
