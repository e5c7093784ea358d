"""Collections of test images: folders, zips, a part of one, ImageNet-Segmentation; with labels, boxes or masks.

``open_data`` opens one by its selector; ``Data.load`` reads an image as a model sees it, ``class_indices`` says which
class of a model, a ``LoadedModel`` with its classes and transform, a label is.
"""

from mamba_attn.datasets.data import open_data
from mamba_attn.datasets.loaded_model import LoadedModel, class_indices
from mamba_attn.datasets.samples import Data, Item, Sample, half_of

__all__ = ["Data", "Item", "LoadedModel", "Sample", "class_indices", "half_of", "open_data"]
