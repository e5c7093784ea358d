"""Attribution methods with captum's interface: ``Method(model).attribute(images)`` gives one map per image.

The room answers one question: which parts of the image does a model's output, or a token, depend on. Public are the
methods in ``__all__`` and their two base classes, which methods of your own extend; ``published``, the maps of other
people's code; and ``catalogue`` and ``spec``, all methods by name. Imported on demand only, because it needs captum.
"""

try:
    import captum.attr  # noqa: F401 - every method is a subclass of its Attribution
except ImportError as error:
    raise ImportError("mamba_attn.attribution needs captum: pip install 'mamba_attn[captum]'") from error

from mamba_attn.attribution.attention_rollout import AttentionRollout
from mamba_attn.attribution.captum_methods import InputXGradient, IntegratedGradients, Occlusion, Saliency
from mamba_attn.attribution.controllability import Controllability
from mamba_attn.attribution.controls import CentreMap, RandomMap
from mamba_attn.attribution.igos_plus_plus import IGOSPlusPlus
from mamba_attn.attribution.implicit_attention import ImplicitAttention
from mamba_attn.attribution.latim import LaTIM
from mamba_attn.attribution.layer_grad_cam import LayerGradCam
from mamba_attn.attribution.lrp.frozen_contribution import FrozenContribution
from mamba_attn.attribution.lrp.keep_and_remove import KeepAndRemoveLRP
from mamba_attn.attribution.lrp.mamba_lrp import MambaLRP
from mamba_attn.attribution.mamba_attribution import MambaAttribution
from mamba_attn.attribution.maps import MapAttribution
from mamba_attn.attribution.mask_refinement import MaskRefinement
from mamba_attn.attribution.raw_attention import RawAttention
from mamba_attn.attribution.relevance_attention_ranks import RelevanceAttentionRanks
from mamba_attn.attribution.together import attribute_together
from mamba_attn.attribution.token_maps import TokenAttribution
from mamba_attn.attribution.vit.attention_grad_cam import AttentionGradCAM
from mamba_attn.attribution.vit.attn_lrp import AttnLRP
from mamba_attn.attribution.vit.libra_grad import LibraGrad
from mamba_attn.attribution.vit.transformer_attribution import TransformerAttribution

__all__ = [
    "AttentionGradCAM",
    "AttentionRollout",
    "AttnLRP",
    "CentreMap",
    "Controllability",
    "FrozenContribution",
    "IGOSPlusPlus",
    "ImplicitAttention",
    "InputXGradient",
    "IntegratedGradients",
    "KeepAndRemoveLRP",
    "LaTIM",
    "LayerGradCam",
    "LibraGrad",
    "MambaAttribution",
    "MambaLRP",
    "MapAttribution",
    "MaskRefinement",
    "Occlusion",
    "RandomMap",
    "RawAttention",
    "RelevanceAttentionRanks",
    "Saliency",
    "TokenAttribution",
    "TransformerAttribution",
    "attribute_together",
]
