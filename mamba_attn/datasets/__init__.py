"""Collections of test images, and models to show them to.

``open_data`` opens folders, zips, a part of one, ImageNet-Segmentation, with labels, boxes or masks; ``load`` builds a
model by its name, ``complete`` finds what one made in memory lacks. ``class_indices`` says which class a label is.
"""

from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.datasets.class_names import class_indices
from mamba_attn.datasets.data import open_data
from mamba_attn.datasets.loading import complete, load
from mamba_attn.datasets.samples import Data, Item, Sample, half_of

__all__ = ["Data", "Item", "LoadedModel", "Sample", "class_indices", "complete", "half_of", "load", "open_data"]
