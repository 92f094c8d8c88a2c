"""What the loss takes from a model: the image features and mask tokens of one step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SAMFeatures(NamedTuple):
    """Image features and mask tokens of one step of a SAM.

    A sample is a pair of an image and a prompt; the features of an image are not repeated for its prompts. There may be
    none, b = s = 0, in one of several processes under ``global_batch``.

    Attributes:
        image_features: ``[b, d, h, w]``, the encoder's output as the mask decoder receives it.
        mask_tokens: ``[s, n, d]``, the mask tokens as the decoder's transformer returns them.
        image_index: ``[s]``, integers: the image of each sample; None when s = b and sample i belongs to image i.
            Keep it on the CPU: it is read there, once per call.

    """

    image_features: Tensor
    mask_tokens: Tensor
    image_index: Tensor | None = None


def check_features(function: str, name: str, features: SAMFeatures, *, may_be_empty: bool = False) -> None:
    """Raise unless ``features`` are well formed; ``function`` and ``name`` begin the message.

    ``may_be_empty`` says whether there may be no samples, or no images either.

    Raises:
        TypeError: a member is not a tensor of the right kind.
        ValueError: shapes, devices or indices do not fit each other.

    """
    if not isinstance(features, SAMFeatures):
        raise TypeError(
            f"{function}: {name} must be SAMFeatures, got {type(features).__name__}; "
            "make them from a map and tokens, or let InfoSAMLoss read a tap"
        )
    for member in ("image_features", "mask_tokens"):
        value = getattr(features, member)
        # Of the dtypes of one byte there is no arithmetic.
        known = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize > 1
        if not known or value.layout != torch.strided:
            fact = type(value).__name__ if not isinstance(value, Tensor) else value.layout if known else value.dtype
            raise TypeError(
                f"{function}: {name}.{member} must be a floating-point tensor, got {fact}; "
                "pass what the model computed, in any float dtype"
            )
    image_features, mask_tokens, image_index = features
    first = 1 if may_be_empty else 0
    if image_features.ndim != 4 or 0 in image_features.shape[first:]:
        raise ValueError(
            f"{function}: {name}.image_features must have shape [b, d, h, w] without zeros, got "
            f"{tuple(image_features.shape)}; for tokens [b, l, d] pass tokens.mT.unsqueeze(-1)"
        )
    if mask_tokens.ndim != 3 or 0 in mask_tokens.shape[first:]:
        raise ValueError(
            f"{function}: {name}.mask_tokens must have shape [s, n, d] without zeros, got {tuple(mask_tokens.shape)}; "
            "flatten images and prompts into s, and keep n = 1 for a single token"
        )
    if image_features.device != mask_tokens.device:
        raise ValueError(
            f"{function}: {name}.image_features and {name}.mask_tokens must be on one device, got "
            f"{image_features.device} and {mask_tokens.device}; move one of them"
        )
    if image_features.shape[1] != mask_tokens.shape[2]:
        raise ValueError(
            f"{function}: {name}.image_features and {name}.mask_tokens must have as many channels, got "
            f"{image_features.shape[1]} and {mask_tokens.shape[2]}; take both from the mask decoder's own width"
        )
    if image_index is None:
        # By shapes, as len() of a tensor is a function of Python's.
        if image_features.shape[0] != mask_tokens.shape[0]:
            raise ValueError(
                f"{function}: {name}.image_index must say which image each sample belongs to when their numbers "
                f"differ, got None with {len(image_features)} images and {len(mask_tokens)} samples; "
                "for p prompts an image pass torch.arange(b).repeat_interleave(p)"
            )
        return
    if not isinstance(image_index, Tensor) or image_index.dtype not in (torch.int64, torch.int32):
        fact = image_index.dtype if isinstance(image_index, Tensor) else type(image_index).__name__
        raise TypeError(f"{function}: {name}.image_index must be an int64 tensor, got {fact}; convert it with .long()")
    if image_index.shape != mask_tokens.shape[:1]:
        raise ValueError(
            f"{function}: {name}.image_index must have shape [s] = [{len(mask_tokens)}], got "
            f"{tuple(image_index.shape)}; give one image per sample of mask_tokens"
        )


def image_of_samples(function: str, name: str, features: SAMFeatures) -> list[int] | None:
    """Return the image of each sample as a list, or None when sample i belongs to image i.

    Raises:
        ValueError: an index names no image.

    """
    if features.image_index is None:
        return None
    index: list[int] = features.image_index.tolist()
    n_images = len(features.image_features)
    if index and (min(index) < 0 or max(index) >= n_images):
        raise ValueError(
            f"{function}: {name}.image_index must lie in [0, {n_images - 1}] with {n_images} images, got "
            f"{min(index)} to {max(index)}; count images from 0 in the order of image_features"
        )
    return None if index == list(range(n_images)) else index


def images_of_pair(
    function: str, teacher: SAMFeatures, student: SAMFeatures, *, least: int, check_finite: bool
) -> list[int] | None:
    """Return the image of each sample, the same for both; None when sample i belongs to image i.

    ``function`` begins the message of an error.

    Raises:
        ValueError: they do not fit, are fewer samples than ``least``, are not finite where that is looked for, or
            nothing of the student requires grad while gradients are on.

    """
    for member in ("image_features", "mask_tokens"):
        teacher_value, student_value = getattr(teacher, member), getattr(student, member)
        if teacher_value.shape != student_value.shape:
            raise ValueError(
                f"{function}: {member} of teacher and student must have one shape, got {tuple(teacher_value.shape)} "
                f"and {tuple(student_value.shape)}; run both on the same images and prompts at one size, and call "
                "clear() on the student's tap after a step whose loss was skipped"
            )
        if teacher_value.device != student_value.device:
            raise ValueError(
                f"{function}: {member} of teacher and student must be on one device, got {teacher_value.device} and "
                f"{student_value.device}; move one of the models"
            )
    n_samples = student.mask_tokens.shape[0]
    if n_samples < least:
        raise ValueError(
            f"{function}: the batch must hold at least two samples (image, prompt), got 1: the loss and its "
            "gradient would be zero; use a larger batch, several prompts per image, global_batch=True in several "
            "processes, InfoSAMLoss(bank_size=...), or run the student through its tap on several batches before the "
            "loss; where the last batch of an epoch is one image, drop_last=True of the DataLoader "
            "(dataloader_drop_last of transformers' Trainer)"
        )
    if torch.is_grad_enabled() and not (student.image_features.requires_grad or student.mask_tokens.requires_grad):
        raise ValueError(
            f"{function}: the student's features must require grad, got features without gradient; run the student "
            "without torch.no_grad, with parameters that are trained, or compute the loss under torch.no_grad"
        )
    images = image_of_samples(function, "teacher", teacher)
    if images != image_of_samples(function, "student", student):
        raise ValueError(
            f"{function}: image_index of teacher and student must be the same, got different samples; "
            "run both on the same images and prompts, in the same order"
        )
    if check_finite:
        _check_finite(function, teacher, student)
    return images


def _check_finite(function: str, teacher: SAMFeatures, student: SAMFeatures) -> None:
    for name, features in (("teacher", teacher), ("student", student)):
        for member in ("image_features", "mask_tokens"):
            value = getattr(features, member)
            finite = value.detach().isfinite().flatten(1).all(1)
            if not finite.all():
                raise ValueError(
                    f"{function}: {name}.{member} must be finite, got NaN or inf in rows "
                    f"{(~finite).nonzero().flatten().tolist()} of {len(finite)}; skip the step, lower the learning "
                    "rate, or run that model in fp32"
                )
