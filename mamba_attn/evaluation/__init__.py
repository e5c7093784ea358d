"""Attribution methods judged on one scale: perturbation, localisation, sanity checks, cost; any model, any method.

``mamba-attn compare`` runs all of it. In code: ``perturb`` and ``auc``, ``locate``, ``randomisation``, ``cost`` judge
maps from any source; ``open_data`` reads test images with their truth.
"""

from mamba_attn.datasets.data import open_data
from mamba_attn.datasets.samples import Data, Sample, half_of
from mamba_attn.evaluation.cost import Cost, cost
from mamba_attn.evaluation.intervals import Interval, bootstrap
from mamba_attn.evaluation.localisation import Located, average_precision, energy_share, locate
from mamba_attn.evaluation.perturbation import Clean, Perturbed, auc, clean_answers, deletion, insertion, perturb
from mamba_attn.evaluation.ranking import ranking, token_cell
from mamba_attn.evaluation.sanity import cascade, randomisation, spearman

__all__ = [
    "Clean",
    "Cost",
    "Data",
    "Interval",
    "Located",
    "Perturbed",
    "Sample",
    "auc",
    "average_precision",
    "bootstrap",
    "cascade",
    "clean_answers",
    "cost",
    "deletion",
    "energy_share",
    "half_of",
    "insertion",
    "locate",
    "open_data",
    "perturb",
    "randomisation",
    "ranking",
    "spearman",
    "token_cell",
]
