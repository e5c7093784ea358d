"""LoadedModel: a network with what is needed to show pictures to it and to read its answer."""

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamba_attn._types import Float
from mamba_attn.core.layout import TokenLayout
from mamba_attn.core.outputs import find_scores
from mamba_attn.core.transform import Transform

HEADS = ("softmax", "sigmoid", "none")


@dataclass(eq=False, repr=False)
class LoadedModel:
    """A model to explain, your own or one that ``mamba_attn.load`` built.

    Args:
        model: the network.
        transform: from a picture to its input; whatever ``Transform.of`` reads. Default: found when it is needed, from
            the model's own attributes, and said.
        classes: the names of its outputs; [] for a backbone, whose outputs are features. Default: numbers.
        head: what its outputs are: "softmax" of one class among all, "sigmoid" of each class by itself, "none" of
            numbers that are no probabilities.
        layout: the token frame, where it cannot be measured; see ``mamba_attn.trace``.
        name: in titles and files. Default: the type of the network.
        spec: what ``mamba_attn.load`` built it from; "" for a model made in memory.
        weights: "demo", "official" or a file.
        options: of its builder.
        stand_ins: whether building it needed ``mamba_attn.cpu_stand_ins``.
        reads: "images", or "text": ids of tokens.
        tokenizer: of a model that reads text, transformers' or a ``models.language.Vocabulary``; None without one.

    Raises:
        TypeError: not a module, or not a transform.
        ValueError: an unknown head, or what ``Transform.of`` refuses.

    Example:
        >>> LoadedModel(model, classes=["hat", "shoe"], head="sigmoid").classes
        ['hat', 'shoe']
    """

    model: nn.Module
    transform: Any = None  # a Transform as soon as it is known
    classes: Any = None  # a list of names as soon as they are known
    head: str = "softmax"
    layout: TokenLayout | Mapping[str, TokenLayout] | Callable[[str, int], TokenLayout | None] | None = None
    name: Any = None  # its type where none is given
    _: KW_ONLY
    spec: str = ""
    weights: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    stand_ins: bool = False
    reads: str = "images"
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"LoadedModel(model={type(self.model).__name__}): expected a torch.nn.Module.")
        if self.head not in HEADS:
            raise ValueError(f"LoadedModel(head={self.head!r}): expected one of {HEADS}.")
        if isinstance(self.classes, str):
            raise TypeError(f"LoadedModel(classes={self.classes!r}): expected a list of names, one per class.")
        self.name = type(self.model).__name__ if self.name is None else self.name
        self.classes = None if self.classes is None else [str(name) for name in self.classes]
        self.transform = None if self.transform is None else Transform.of(self.transform)

    def __repr__(self) -> str:
        classes = "" if self.classes is None else f", {len(self.classes)} classes"
        return f"LoadedModel({self.name}, {self.parameters:,} parameters{classes}, {self.transform})"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights and their names."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(name.encode() + flat.numpy().tobytes())
        return digest.hexdigest()[:12]

    @cached_property
    def code_fingerprint(self) -> str:
        """Hash of the files that define the model's modules and the function that prepares its images.

        The same weights give other answers where a ``forward`` was edited. It is the same on every machine that holds
        the same files, so that processes which share their work agree.
        """
        owners = [*map(type, self.model.modules()), getattr(self.transform, "function", None)]
        modules = {getattr(owner, "__module__", None) for owner in owners}
        files = {getattr(sys.modules.get(str(name)), "__file__", None) for name in modules}
        contents = [Path(file).read_bytes() for file in files if file is not None and Path(file).is_file()]
        return hashlib.sha256(b"".join(sorted(hashlib.sha256(each).digest() for each in contents))).hexdigest()[:12]

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next((each.device for each in self.model.parameters()), torch.device("cpu"))

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def gives_probabilities(self) -> bool:
        """Whether ``probabilities`` are any: one output alone is no share of anything, unless its head says so."""
        return self.head == "sigmoid" or (self.head == "softmax" and len(self.classes or "") != 1)

    def logits(self, inputs: Tensor) -> Float[Tensor, "batch classes"] | None:
        """Run the model, and return its scores; None where its output holds none, as that of a backbone.

        Args:
            inputs: a batch of what its transform returns.
        """
        return self.scores(self.model(inputs), len(inputs))

    def scores(self, output: Any, batch: int) -> Float[Tensor, "batch classes"] | None:
        """Return the scores in what the model returned; None where there are none, as in that of a backbone.

        Args:
            output: of the model.
            batch: number of images.
        """
        found = None if self.classes == [] else find_scores(output, batch)[0]  # features are no classes
        if found is None or found.tensor.ndim > 2:
            return None
        return found.tensor if found.tensor.ndim == 2 else found.tensor[:, None]

    def probabilities(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        """Return what the head makes of scores; with head="none" the scores themselves."""
        if self.head == "sigmoid":
            return logits.float().sigmoid()
        # softmax of one output is 1 whatever it is
        return logits.float().softmax(1) if self.head == "softmax" and logits.shape[1] > 1 else logits.float()
