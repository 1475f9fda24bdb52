"""One-bit BERT, the training side: BiBERT (arXiv 2203.06390), BiT (arXiv 2205.13016) and BinaryBERT
(arXiv 2012.15701) in eager PyTorch.

    student = BinarizedBert.from_dense(bert, "bibert", ties="below")
    history = distil(student, bert, batches)
"""

from .conversion import binarize
from .distillation import (
    DistillationWeights,
    direction_matching_loss,
    distil,
    distillation_loss,
    evaluate,
    hidden_mse_loss,
    hidden_norm_loss,
    soft_cross_entropy,
    teacher_outputs,
)
from .modules import (
    BinarizedEmbedding,
    BinarizedEncoder,
    BinarizedLayer,
    BinarizedLinear,
    BinarizedSelfAttention,
    QuantizerOptions,
)
from .quantizers import (
    BITS,
    SCALE_FLOOR,
    SCHEMES,
    TIES,
    ElasticBinarizer,
    SignQuantizer,
    UniformQuantizer,
    bool_ste,
    elastic_bits,
    elastic_sign,
    sign,
    sign_ste,
    straight_through,
    uniform,
    uniform_rows,
)
from .report import BinaryReport, SizeReport
from .student import BinarizedBert, BinarizedBertConfig, BinarizedBertOutput
from .weights import binarize_weight, weight_parts

__all__ = [
    "BITS",
    "SCALE_FLOOR",
    "SCHEMES",
    "TIES",
    "BinarizedBert",
    "BinarizedBertConfig",
    "BinarizedBertOutput",
    "BinarizedEmbedding",
    "BinarizedEncoder",
    "BinarizedLayer",
    "BinarizedLinear",
    "BinarizedSelfAttention",
    "BinaryReport",
    "DistillationWeights",
    "ElasticBinarizer",
    "QuantizerOptions",
    "SignQuantizer",
    "SizeReport",
    "UniformQuantizer",
    "binarize",
    "binarize_weight",
    "bool_ste",
    "direction_matching_loss",
    "distil",
    "distillation_loss",
    "elastic_bits",
    "elastic_sign",
    "evaluate",
    "hidden_mse_loss",
    "hidden_norm_loss",
    "sign",
    "sign_ste",
    "soft_cross_entropy",
    "straight_through",
    "teacher_outputs",
    "uniform",
    "uniform_rows",
    "weight_parts",
]
