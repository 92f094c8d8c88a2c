"""The InfoSAM loss for fine-tuning Segment Anything models, and the matrix-based Rényi entropies behind it."""

from renyi_kd.accumulation import Accumulation
from renyi_kd.diagnostics import RelationDiagnostics
from renyi_kd.entropy import conditional_entropy, joint_entropy, mutual_information, renyi_entropy
from renyi_kd.feature_entropy import feature_entropy, feature_mutual_information
from renyi_kd.functional import infosam_terms
from renyi_kd.gram import RBF, Linear, Polynomial, gram_matrix
from renyi_kd.loss import InfoSAMLoss
from renyi_kd.objective import InfoSAMTerms, Objective
from renyi_kd.ops.dispatch import Implementation, implementation
from renyi_kd.relation import RelationModule
from renyi_kd.sam.features import SAMFeatures
from renyi_kd.sam.step import Call, Step
from renyi_kd.sam.tap import Tap, tap
from renyi_kd.teachers.adapter_disabled import AdapterDisabled
from renyi_kd.teachers.cached import CachedTeacher
from renyi_kd.teachers.teacher import Teacher

__version__ = "0.1.0"

__all__ = [
    "RBF",
    "Accumulation",
    "AdapterDisabled",
    "CachedTeacher",
    "Call",
    "Implementation",
    "InfoSAMLoss",
    "InfoSAMTerms",
    "Linear",
    "Objective",
    "Polynomial",
    "RelationDiagnostics",
    "RelationModule",
    "SAMFeatures",
    "Step",
    "Tap",
    "Teacher",
    "conditional_entropy",
    "feature_entropy",
    "feature_mutual_information",
    "gram_matrix",
    "implementation",
    "infosam_terms",
    "joint_entropy",
    "mutual_information",
    "renyi_entropy",
    "tap",
]
