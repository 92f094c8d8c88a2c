"""Whether the features of teacher and student are of the same samples, and fit for the loss."""

from __future__ import annotations

import torch

from renyi_kd.features import SAMFeatures, image_of_samples


def images_of_pair(teacher: SAMFeatures, student: SAMFeatures, *, least: int, check_finite: bool) -> list[int] | None:
    """Return the image of each sample, the same for both; None when sample i belongs to image i.

    Raises:
        ValueError: they do not fit, are fewer samples than ``least``, are not finite where that is looked for, or
            nothing of the student requires grad while gradients are on.

    """
    for member in ("image_features", "mask_tokens"):
        of_teacher, of_student = getattr(teacher, member), getattr(student, member)
        if of_teacher.shape != of_student.shape:
            raise ValueError(
                f"infosam_terms: {member} of teacher and student must have one shape, got {tuple(of_teacher.shape)} "
                f"and {tuple(of_student.shape)}; run both on the same images and prompts at one size, and call "
                "clear() on the student's tap after a step whose loss was skipped"
            )
        if of_teacher.device != of_student.device:
            raise ValueError(
                f"infosam_terms: {member} of teacher and student must be on one device, got {of_teacher.device} and "
                f"{of_student.device}; move one of the models"
            )
    n_samples = len(student.mask_tokens)
    if n_samples < least:
        raise ValueError(
            "infosam_terms: the batch must hold at least two samples (image, prompt), got 1: the loss and its "
            "gradient would be zero; use a larger batch, several prompts per image, global_batch=True in several "
            "processes, InfoSAMLoss(bank_size=...), or run the student through its tap on several batches before the "
            "loss"
        )
    if torch.is_grad_enabled() and not (student.image_features.requires_grad or student.mask_tokens.requires_grad):
        raise ValueError(
            "infosam_terms: the student's features must require grad, got features without gradient; run the student "
            "without torch.no_grad, with parameters that are trained, or compute the loss under torch.no_grad"
        )
    images = image_of_samples("infosam_terms", "teacher", teacher)
    if images != image_of_samples("infosam_terms", "student", student):
        raise ValueError(
            "infosam_terms: image_index of teacher and student must be the same, got different samples; "
            "run both on the same images and prompts, in the same order"
        )
    if check_finite:
        _check_finite(teacher, student)
    return images


def _check_finite(teacher: SAMFeatures, student: SAMFeatures) -> None:
    for name, features in (("teacher", teacher), ("student", student)):
        for member in ("image_features", "mask_tokens"):
            value = getattr(features, member)
            finite = value.detach().isfinite().flatten(1).all(1)
            if not finite.all():
                raise ValueError(
                    f"infosam_terms: {name}.{member} must be finite, got NaN or inf in rows "
                    f"{(~finite).nonzero().flatten().tolist()} of {len(finite)}; skip the step, lower the learning "
                    "rate, or run that model in fp32"
                )
