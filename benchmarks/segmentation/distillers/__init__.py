"""The distillation losses that InfoSAM is compared with, behind one call.

>>> distiller = make("mobilesam", dim=256)
>>> distiller.needs_layers
False
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.segmentation.distillers.attention import IBD, SemCKD
from benchmarks.segmentation.distillers.base import Distiller, NoDistillation
from benchmarks.segmentation.distillers.features import PKD, PKT, VID
from benchmarks.segmentation.distillers.outputs import Logit
from benchmarks.segmentation.distillers.relations import InfoSAM, WithRelation, seeded_loss
from benchmarks.segmentation.distillers.review import ReviewKD
from benchmarks.segmentation.distillers.sam import MobileSAM, TinySAM
from benchmarks.segmentation.distillers.share import AtShare

__all__ = ["DISTILLERS", "Distiller", "InfoSAM", "make", "needs_layers"]

# With those of a batch of 4, sixteen samples a step.
BANK_SIZE = 12
# Of the task's gradient.
SHARE = 0.1
# The module as it was initialised, and each sample's relation compared with the teacher's of the same sample.
FROZEN_PAIRS: dict[str, Any] = {"distillation": "jensen_renyi", "lambda_r": 0.0, "lambda_d": 1.0}
# Settings of the loss.
_FORMS: dict[str, dict[str, Any]] = {
    "infosam": {},
    "infosam_no_lr": {"lambda_r": 0.0},
    "infosam_no_ld": {"lambda_d": 0.0},
    "infosam_tenth": {"lambda_r": 0.1, "lambda_d": 0.05},
    "infosam_alpha_1": {"alpha": 1.0},
    "infosam_alpha_3": {"alpha": 3.0},
    "infosam_detached": {"detach_teacher_relation": True},
    "infosam_bank": {"bank_size": BANK_SIZE},
    "infosam_cauchy_schwarz": {"distillation": "cauchy_schwarz"},
    "infosam_debiased": {"distillation": "debiased"},
    "infosam_jensen_renyi": FROZEN_PAIRS,
    "infosam_share": {"gradient_share": SHARE},
    "infosam_cauchy_schwarz_share": {"distillation": "cauchy_schwarz", "gradient_share": SHARE},
    "infosam_debiased_share": {"distillation": "debiased", "gradient_share": SHARE},
    "infosam_jensen_renyi_share": {**FROZEN_PAIRS, "gradient_share": SHARE},
}
# Of the width of the decoder and the channels of the encoder's stages.
_MAKERS: dict[str, Callable[[int, Sequence[int]], Distiller]] = {
    "none": lambda dim, layers: NoDistillation(),
    "logit": lambda dim, layers: Logit(),
    "pkd": lambda dim, layers: PKD(),
    "pkt": lambda dim, layers: PKT(),
    "ibd": lambda dim, layers: IBD(layers),
    "vid": lambda dim, layers: VID(dim),
    "semckd": lambda dim, layers: SemCKD(layers),
    "reviewkd": lambda dim, layers: ReviewKD(layers),
    "tinysam": lambda dim, layers: TinySAM(),
    "mobilesam": lambda dim, layers: MobileSAM(),
    "mobilesam_relation": lambda dim, layers: WithRelation(MobileSAM(), dim),
    "tinysam_relation": lambda dim, layers: WithRelation(TinySAM(), dim),
}
# The plain ones, the forms, and the forms beside plain ones, in the order of the tables.
DISTILLERS: tuple[str, ...] = tuple(
    sorted({**_MAKERS, **_FORMS}, key=lambda name: 2 if name.endswith("_relation") else name in _FORMS)
)


def make(
    name: str, *, dim: int, layer_channels: Sequence[int] = (), share: float = 0.0, measured: bool = False
) -> Distiller:
    """Return a distiller by its name in ``DISTILLERS``.

    Args:
        name: which.
        dim: channels of image features and mask tokens.
        layer_channels: channels of the encoder's stages in the observations, from early to late; of use to a distiller
            with ``needs_layers`` alone.
        share: of the task's gradient that the distiller's is to have; 0 for the weights of its source.
        measured: whether the share is measured at those weights too.

    Raises:
        ValueError: the name is unknown, or the distiller needs stages and there are none.

    """
    if name not in DISTILLERS:
        raise ValueError(f"make: name must be one of {', '.join(DISTILLERS)}, got {name!r}; choose one of them")
    if name in _FORMS:
        # The loss measures its share itself.
        return InfoSAM(seeded_loss(dim, **_FORMS[name], **({"gradient_share": share} if share else {})))
    made = _MAKERS[name](dim, layer_channels)
    return AtShare(made, share or None) if (share or measured) and name != "none" else made


def needs_layers(name: str) -> bool:
    """Return whether a distiller's observations must hold the encoder's stages."""
    return make(name, dim=1, layer_channels=(1,)).needs_layers
