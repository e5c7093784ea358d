"""Published figures, and when ours may stand beside them: official weights, ImageNet's images.

Ali, Zimerman and Wolf, "The Hidden Attention of Mamba Models" (arXiv 2403.01590v2; ACL 2025): perturbation, Table 1
(ImageNet validation images, AUC x 100; maps of the predicted class, accuracy against the label, as the code that the
protocol is of: our ``..._target``); segmentation, Table 2 (ImageNet-Segmentation, percent).
The models are Vim-S and a Transformer of the same size. The row of MambaLRP is in the ACL version only.
"""

from dataclasses import dataclass

from mamba_attn.datasets.labels import is_imagenet
from mamba_attn.evaluation.summary import Table

VIM = "Vim-S"
MAMBA = "vim_small"
_CLASSES = 1000


@dataclass(frozen=True)
class Published:
    """One row of a table.

    Args:
        paper: what the paper calls the method.
        ours: what we call it.
        model: "Vim-S" or "Transformer-S".
        figures: by the names of our metrics.
    """

    paper: str
    ours: str
    model: str
    figures: dict[str, float]


def _auc(paper: str, ours: str, model: str, positive: float, negative: float) -> Published:
    return Published(paper, ours, model, {"positive_auc_target": positive, "negative_auc_target": negative})


def _seg(paper: str, ours: str, model: str, accuracy: float, precision: float, miou: float) -> Published:
    return Published(paper, ours, model, {"pixel_accuracy": accuracy, "map": precision, "miou": miou})


PERTURBATION = (
    _auc("Raw-Attention", "raw_attention", VIM, 17.268, 34.025),
    _auc("Attn-Rollout", "attention_rollout", VIM, 18.806, 41.864),
    _auc("Mamba-Attr", "mamba_attribution", VIM, 16.619, 39.632),
    _auc("Raw-Attention", "raw_attention", "Transformer-S", 20.687, 40.766),
    _auc("Attn-Rollout", "attention_rollout", "Transformer-S", 20.594, 43.525),
    _auc("Transformer-Attr", "transformer_attribution", "Transformer-S", 15.351, 48.089),
)
SEGMENTATION = (
    _seg("Raw-Attention", "raw_attention", VIM, 67.64, 74.88, 45.09),
    _seg("Attn-Rollout", "attention_rollout", VIM, 71.01, 80.78, 51.51),
    _seg("LRP attribution (Jafari et al.)", "mamba_lrp", VIM, 71.19, 77.04, 49.98),
    _seg("Mamba-Attr", "mamba_attribution", VIM, 74.72, 81.70, 54.24),
    _seg("Raw-Attention", "raw_attention", "Transformer-S", 59.69, 77.25, 36.94),
    _seg("Attn-Rollout", "attention_rollout", "Transformer-S", 66.84, 80.34, 47.85),
    _seg("Transformer-Attr", "transformer_attribution", "Transformer-S", 79.26, 84.85, 60.63),
)
ABSENT = (
    "Published figures are of Vim-S with the official weights on ImageNet's validation images, or on "
    "ImageNet-Segmentation. Neither is here, so none are shown: figures of other models and images do not compare."
)


def beside(table: Table) -> tuple[Published, ...]:
    """Return the rows that ours compare with; none unless weights and images are those of the paper."""
    if table.model.name != MAMBA or table.model.weights == "demo" or len(table.model.subject.classes) != _CLASSES:
        return ()
    if table.data.identity.startswith("gtsegs_ijcv.mat"):
        return SEGMENTATION
    whole = is_imagenet(table.data) and len(table.data.classes) == _CLASSES
    return PERTURBATION if whole else ()
