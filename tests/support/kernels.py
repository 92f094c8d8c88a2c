"""Inputs for the kernels in every layout, and what they are compared with."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from renyi_kd.ops.batch_gram import batch_gram
from renyi_kd.ops.dispatch import Impl
from renyi_kd.ops.relation_scores import relation_scores
from tests.support import randn
from tests.support.tolerance import assert_close_on_scale, assert_within_budget


def storage(*order: int):
    """Return a function that keeps a map's values and stores its dimensions in ``order``."""

    def lay_out(x: Tensor) -> Tensor:
        inverse = [order.index(i) for i in range(4)]
        return x.permute(order).contiguous().permute(inverse)

    return lay_out


def with_gaps(x: Tensor) -> Tensor:
    b, d, h, w = x.shape
    wide = torch.full((b + 1, 2 * d, h + 2, 3 * w + 2), math.nan, dtype=x.dtype, device=x.device)
    wide[1:, ::2, 1:-1, 1:-1:3] = x
    return wide[1:, ::2, 1:-1, 1:-1:3]


def channels_last_with_gaps(x: Tensor) -> Tensor:
    b, d, h, w = x.shape
    wide = torch.full((b, h, 2 * w, d + 3), math.nan, dtype=x.dtype, device=x.device)
    wide[:, :, ::2, 1:-2] = x.permute(0, 2, 3, 1)
    return wide[:, :, ::2, 1:-2].permute(0, 3, 1, 2)


def expanded(x: Tensor) -> Tensor:
    return x[:, :, :1, :1].expand_as(x)


LAYOUTS = {
    "channel-first": storage(0, 1, 2, 3),
    "channels-last": storage(0, 2, 3, 1),
    "gaps": with_gaps,
    "channels-last, gaps": channels_last_with_gaps,
    "h b w d": storage(2, 0, 3, 1),
    "w d h b": storage(3, 1, 2, 0),
    "columns first": storage(0, 1, 3, 2),
    "expanded": expanded,
}


def textbook_scores(
    x: Tensor, directions: Tensor, images: list[int] | Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Layer-normalise every pixel without affine part, then multiply."""
    pixels = rearrange(x if images is None else x[images], "s d h w -> s (h w) d")
    return directions @ F.layer_norm(pixels.to(directions.dtype), pixels.shape[-1:], eps=eps).mT


def textbook_gram(rows: Tensor) -> Tensor:
    rows = rows.flatten(1).to(torch.promote_types(rows.dtype, torch.float32))
    return rows @ rows.mT


def value_and_gradients(function, *tensors: Tensor, **keywords) -> list[Tensor]:
    """Return the value of ``function`` and its gradients, for an upstream gradient that is random."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = function(*leaves, **keywords)
    upstream = randn(*value.shape, seed=99, dtype=value.dtype).to(value.device)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def inputs(shape, dtype=torch.float32, n_samples=None, n_tokens=2) -> tuple[Tensor, Tensor]:
    directions = randn(
        n_samples or shape[0], n_tokens, shape[1], seed=1, dtype=torch.promote_types(dtype, torch.float32)
    )
    # Not standard normal: a forgotten mean or deviation must show.
    return 1.5 * randn(*shape, dtype=dtype) - 0.7, directions


def check_scores(
    x: Tensor,
    directions: Tensor,
    images: list[int] | Tensor | None = None,
    slack: float = 2.0,
    impl: Impl = "auto",
    **keywords,
) -> list[Tensor]:
    """Compare scores and both gradients with the textbook's, and return them."""
    actual = value_and_gradients(relation_scores, x, directions, image_index=images, impl=impl, **keywords)
    eager = value_and_gradients(textbook_scores, x, directions, images=images, **keywords)
    exact = value_and_gradients(textbook_scores, x.double(), directions.double(), images=images, **keywords)
    check(
        ("scores", "grad_features", "grad_directions"),
        actual,
        eager,
        exact,
        (directions.dtype, x.dtype, directions.dtype),
        slack,
    )
    return actual


def check_scores_as_if_rounded_once_more(x: Tensor, directions: Tensor) -> None:
    """Compare with what one more rounding of the features does: more digits than they have, nobody can use."""
    actual = value_and_gradients(relation_scores, x, directions)
    exact = value_and_gradients(textbook_scores, x.double(), directions.double())
    last_bit = torch.finfo(x.dtype).eps * randn(*x.shape, seed=11).sign().double()
    rounded = value_and_gradients(textbook_scores, x.double() * (1 + last_bit), directions.double())
    check(
        ("scores", "grad_features", "grad_directions"),
        actual,
        rounded,
        exact,
        (directions.dtype, x.dtype, directions.dtype),
    )


def check(names, actual, eager, exact, dtypes, slack: float = 2.0) -> None:
    for name, a, e, t, dtype in zip(names, actual, eager, exact, dtypes, strict=True):
        assert a.dtype == dtype, name
        if dtype == torch.float64:
            assert_close_on_scale(a, t, name=name, rtol=1e-12)
        else:
            assert_within_budget(a, e, t, name=name, slack=slack)


def check_gram(rows: Tensor, impl: Impl = "auto") -> Tensor:
    """Compare the Gram and its gradient with the textbook's, and return the gradient."""
    actual = value_and_gradients(batch_gram, rows, impl=impl)
    assert actual[0].dtype == torch.float64
    eager = value_and_gradients(lambda x: textbook_gram(x).double(), rows)
    exact = value_and_gradients(textbook_gram, rows.double())
    # What was summed in fp32 is right to fp32.
    actual[0] = actual[0].to(torch.promote_types(rows.dtype, torch.float32))
    # Sums of squares have no sign to cancel: a budget of two would ask for the same order of summation.
    check(("gram", "grad_rows"), actual, eager, exact, (actual[0].dtype, rows.dtype), slack=4.0)
    return actual[1]
