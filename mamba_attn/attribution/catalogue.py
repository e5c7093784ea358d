"""All methods by name: how each is built for a model, and which would do where it does not fit."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

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
from mamba_attn.attribution.vit import block_relevance
from mamba_attn.attribution.vit.attention_grad_cam import AttentionGradCAM
from mamba_attn.attribution.vit.attn_lrp import AttnLRP
from mamba_attn.attribution.vit.libra_grad import LibraGrad
from mamba_attn.attribution.vit.transformer_attribution import TransformerAttribution
from mamba_attn.errors import UnsupportedModelError, nearest
from mamba_attn.tracing.adapters import AttentionAdapter, find_mixers
from mamba_attn.tracing.door_layers import AnyLayout, AnyOrders
from mamba_attn.tracing.layer_kinds import SCANS, SOFTMAX
from mamba_attn.tracing.layer_names import LayerNames

ANY = ("any model",)  # known to trace() or not
_NO_OPTIONS = ("self", "model", "layers", "layout", "orders")  # arguments of the methods that ``build`` gives
TRACED = (SCANS, SOFTMAX)


@dataclass(frozen=True)
class Entry:
    """One method, with options that make it this one.

    Args:
        name: as users write it.
        title: for captions.
        method: its class.
        meaning: what the map shows, a sentence or two; ``{reader}`` stands for whose attention it is.
        made_of: the kinds of layers that the model may be made of.
        of_a_class: whether the map depends on the class.
        class_option: an option that, when False, makes it the same for every class.
        instead: the counterpart for other models; several, for one kind of layers after the other.
        options: arguments of the class.
        check: raises UnsupportedModelError for models that the method refuses all the same.
    """

    name: str
    title: str
    method: type[MapAttribution]
    meaning: str
    made_of: tuple[str, ...] = TRACED
    of_a_class: bool = True
    class_option: str = ""
    instead: str | tuple[str, ...] = "attention_rollout"
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[nn.Module], None] | None = None

    @property
    def reads_rows(self) -> bool:
        """Whether a query means anything to it."""
        return self.method.reads_rows

    def depends_on_class(self, options: Mapping[str, Any]) -> bool:
        """Whether the map depends on the class when the user has chosen these options."""
        return self.of_a_class and options.get(self.class_option, True) is not False

    @property
    def known_options(self) -> dict[str, Any]:
        """The options that are left to the user, and their defaults."""
        parameters = inspect.signature(self.method.__init__).parameters.values()
        keywords = {p.name: p.default for p in parameters if p.name not in _NO_OPTIONS}
        return {name: default for name, default in keywords.items() if name not in self.options}


_GRADIENT_WEIGHTED = "Attention weighted by the gradient of the class, multiplied over the layers."
METHODS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            "raw_attention",
            "raw attention",
            RawAttention,
            "What {reader} reads in a layer, averaged over the layers. The same for every class.",
            of_a_class=False,
        ),
        Entry(
            "attention_rollout",
            "attention rollout",
            AttentionRollout,
            "What reaches {reader} through the product of all layers' attention, residual streams included. The same "
            "for every class.",
            of_a_class=False,
        ),
        Entry(
            "attention_rollout_signed",
            "signed attention rollout",
            AttentionRollout,
            "What reaches {reader} through the product of all layers' attention with its signs, residual streams "
            "included. The same for every class.",
            of_a_class=False,
            options={"signed": True},
        ),
        Entry(
            "mamba_attribution",
            "Mamba-Attribution",
            MambaAttribution,
            _GRADIENT_WEIGHTED,
            (SCANS,),
            instead="transformer_attribution",
        ),
        Entry(
            "implicit_attention",
            "implicit attention",
            ImplicitAttention,
            "Attention with the mixers' gates and convolutions in it, weighted by the gradient of the class, "
            "multiplied over the layers.",
            (SCANS,),
            class_option="gradient",
            instead="transformer_attribution",
        ),
        Entry(
            "mamba_lrp",
            "MambaLRP",
            MambaLRP,
            "The relevance of the class, propagated back layer by layer to the tokens; signed, and it adds up.",
            (SCANS,),
            instead=("attn_lrp", "frozen_contribution"),
        ),
        Entry(
            "keep_and_remove_lrp",
            "keep-and-remove LRP",
            KeepAndRemoveLRP,
            "The relevance of the class (MambaLRP), repeated while parts of the image are kept or removed; our own.",
            (SCANS,),
            instead="transformer_attribution_lrp",
        ),
        Entry(
            "mask_refinement",
            "mask refinement",
            MaskRefinement,
            "The order in which patches alone keep the class, or lose it, descended from the relevance; our own.",
        ),
        Entry(
            "igos_plus_plus",
            "iGOS++",
            IGOSPlusPlus,
            "What the class needs: without it the class is lost, and it alone brings the class back; a learnt mask.",
            ANY,
        ),
        Entry(
            "relevance_attention_ranks",
            "ranks of relevance and attention",
            RelevanceAttentionRanks,
            "The relevance of the class (MambaLRP), reordered with attention; our own combination.",
            (SCANS,),
            instead="transformer_attribution_lrp",
        ),
        Entry(
            "controllability",
            "controllability, Jacobian",
            Controllability,
            "How strongly a token can change the scans' outputs, whatever its content (X-VMamba); the same for every "
            "class.",
            (SCANS,),
            of_a_class=False,
        ),
        Entry(
            "controllability_gramian",
            "controllability, Gramian",
            Controllability,
            "How strongly a token can change the scans' outputs, by the Gramian (X-VMamba); the same for every class.",
            (SCANS,),
            of_a_class=False,
            options={"score": "gramian"},
        ),
        Entry(
            "latim",
            "LaTIM",
            LaTIM,
            "How much of the vector of {reader} each token makes, multiplied over the layers, residual streams "
            "included. The same for every class.",
            (SCANS,),
            of_a_class=False,
        ),
        Entry(
            "attn_lrp",
            "AttnLRP",
            AttnLRP,
            "The relevance of the class, propagated back through attention, queries and keys to the tokens; signed.",
            (SOFTMAX,),
            instead="mamba_lrp",
        ),
        Entry(
            "libra_grad",
            "LibraGrad",
            LibraGrad,
            "What tokens contribute to the class, layers and biases summed, by balanced gradients; signed.",
            (SOFTMAX,),
            instead="mamba_lrp",
        ),
        Entry(
            "transformer_attribution",
            "Transformer-Attribution",
            TransformerAttribution,
            _GRADIENT_WEIGHTED,
            (SOFTMAX,),
            instead="mamba_attribution",
        ),
        Entry(
            "transformer_attribution_lrp",
            "Transformer-Attribution, LRP",
            TransformerAttribution,
            "Relevance of the attention, weighted by the gradient of the class, multiplied over the layers.",
            (SOFTMAX,),
            instead="mamba_attribution",
            options={"variant": "lrp"},
            check=lambda model: block_relevance.require_known("transformer_attribution_lrp", model),
        ),
        Entry(
            "attention_grad_cam",
            "attention GradCAM",
            AttentionGradCAM,
            "What {reader} reads in the last layer, heads weighted by the gradient of the class.",
            (SOFTMAX,),
            instead="grad_cam",
        ),
        Entry(
            "frozen_contribution",
            "frozen contribution",
            FrozenContribution,
            "What every token contributes to the class when gates, steps and attention are held fixed; signed, and "
            "it adds up.",
        ),
        Entry(
            "grad_cam",
            "GradCAM",
            LayerGradCam,
            "Features of the last tokens that reach the head, weighted by the gradient of the class.",
        ),
        Entry(
            "integrated_gradients",
            "integrated gradients",
            IntegratedGradients,
            "The gradient of the class along the way from a grey image, times the image.",
            ANY,
        ),
        Entry(
            "input_x_gradient", "input x gradient", InputXGradient, "The gradient of the class times the image.", ANY
        ),
        Entry("saliency", "saliency", Saliency, "The size of the gradient of the class.", ANY),
        Entry(
            "occlusion", "occlusion", Occlusion, "How much the logit of the class falls when a window is covered.", ANY
        ),
        Entry("random", "random", RandomMap, "A control: random numbers.", ANY, of_a_class=False),
        Entry("centre", "centre", CentreMap, "A control: the middle of the image.", ANY, of_a_class=False),
    )
}


def get(name: str) -> Entry:
    """Return a method by its name.

    Raises:
        ValueError: no such method.
    """
    if name not in METHODS:
        raise ValueError(f"{name}: no such method. {nearest(name, METHODS)}")
    return METHODS[name]


def build(
    name: str,
    model: nn.Module,
    *,
    layers: LayerNames | None = None,
    layout: AnyLayout | None = None,
    orders: AnyOrders | None = None,
    **options: Any,
) -> MapAttribution:
    """Return a method on a model.

    Args:
        name: of the method.
        model: the model.
        layers: names, patterns or numbers of layers; methods that always use the whole model ignore them.
        layout: as in ``mamba_attn.trace``: where the tokens are, for models that do not show it.
        orders: as in ``mamba_attn.trace``: in which order scans walk them, where it cannot be measured.
        options: of the method's class.

    Raises:
        ValueError: no such method, or options that it does not have, or that exclude each other.

    Example:
        >>> build("attention_rollout", model).attribute(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1, 224, 224])
    """
    entry = get(name)
    unknown = [option for option in options if option not in entry.known_options]
    if unknown:
        raise ValueError(f"{name} has no option {unknown[0]!r}. {nearest(unknown[0], entry.known_options)}")
    given = {"layers": layers, "layout": layout, "orders": orders}
    taken = inspect.signature(entry.method.__init__).parameters
    built = entry.method(model, **{k: v for k, v in given.items() if k in taken}, **entry.options, **options)
    built.layout, built.orders = layout, orders  # methods of pixels read them for maps on the token grid alone
    return built


def fitting(model: nn.Module, kinds: Sequence[str] | None = None) -> list[str]:
    """Return the names of all methods that fit a model, controls last.

    Args:
        model: the model.
        kinds: as in ``refusal``.
    """
    return [name for name in METHODS if refusal(name, model, kinds=kinds) is None]


def refusal(name: str, model: nn.Module, called: str | None = None, kinds: Sequence[str] | None = None) -> str | None:
    """Return why a method does not fit a model, and which one does; None if it fits.

    Args:
        name: of the method.
        model: the model.
        called: name of the model in the sentence. Default: its class.
        kinds: of layers that a trace of the model finds, see ``tracing.layer_kinds``. Default: those of its adapters,
            which may know only a part of them.

    Raises:
        ValueError: no such method.
    """
    entry = get(name)
    if entry.made_of == ANY:
        return None
    called = called or type(model).__name__
    kinds = _adapted(model) if kinds is None else kinds
    if not kinds:
        return f"{called} has no layer that can be traced; use integrated_gradients."
    if not set(kinds) <= set(entry.made_of):
        return f"{called} is made of {' and '.join(kinds)}; use {counterpart(name, model, kinds)}."
    try:
        if entry.check is not None:
            entry.check(model)
    except UnsupportedModelError as error:
        return str(error)
    return None


def counterpart(name: str, model: nn.Module, kinds: Sequence[str] | None = None) -> str:
    """Return the method itself if it fits the model, else its counterpart, else a general one.

    Args:
        name: of the method.
        model: the model.
        kinds: as in ``refusal``.
    """
    found = set(_adapted(model) if kinds is None else kinds)
    other = get(name).instead
    others = (other,) if isinstance(other, str) else other
    candidates = (get(each) for each in (name, *others, "attention_rollout", "integrated_gradients"))
    return next(its.name for its in candidates if its.made_of == ANY or (found and found <= set(its.made_of)))


def _adapted(model: nn.Module) -> list[str]:
    """The kinds of layers that adapters know."""
    try:
        adapters = [adapter for _, adapter in find_mixers(model).values()]
    except UnsupportedModelError:
        return []
    return list(dict.fromkeys(SOFTMAX if isinstance(each, AttentionAdapter) else SCANS for each in adapters))
