"""load(): a model by what a user names, with its weights, transform and classes; ``complete`` for one made in memory.

What is adapted or guessed is said, as a warning. Code of a user's runs only where the user names it.
"""

import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from mamba_attn.core.decisions import decided
from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.outputs import described, find_scores
from mamba_attn.core.training_mode import warn_of_training
from mamba_attn.core.transform import Transform
from mamba_attn.datasets.class_names import names_for, read_names
from mamba_attn.datasets.user_code import build_model, find_function, names_code, stand_ins_for, takes
from mamba_attn.errors import UnsupportedModelError, WeightsError, local_path, nearest
from mamba_attn.models import checkpoints, registry
from mamba_attn.tracing.undisturbed import undisturbed

NO_COMPANION = "none"
KINDS = "FILE.py:FUNCTION, PACKAGE.MODULE:FUNCTION, timm:NAME or hf:FOLDER"
_MICRO = ("vmamba_micro", "vim_micro", "vit_micro")  # companions; the package has none for other sizes
_SIDE = 224
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")
_OUTPUTS = "_outputs"  # where the number of outputs is remembered
# raised by a model that is shown an image it cannot take
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError)


def load(
    spec: str,
    weights: str | Path | None = None,
    *,
    transform: Any = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    range: tuple[float, float] | None = None,
    classes: str | Path | Sequence[str] | None = None,
    head: str | None = None,
    layout: Any = None,
    device: str = "cpu",
    stand_ins: str = "auto",
    trust_remote_code: bool = False,
    **options: Any,
) -> LoadedModel:
    """Build a model, with its weights, transform and classes.

    Args:
        spec: a name of ``mamba_attn.models`` (``mamba-attn models`` lists them); ``file.py:function`` or
            ``package.module:function``, your own code, which is run, and returns an ``nn.Module`` or a
            ``LoadedModel``; ``timm:NAME``; ``hf:FOLDER``, a model of transformers with its image processor, or a
            language model with its tokenizer.
        weights: the path of a checkpoint (see ``mamba_attn.models.create``), or ``FILE:ENTRY``; "demo", "official" or
            "random", which for your own code is what it returns. Default: "demo" for a name of ``mamba_attn.models``,
            else what the builder itself loads.
        transform: as in ``LoadedModel``. Default: the model's own.
        mean: of each channel, instead of the transform's.
        std: standard deviation of each channel, instead of the transform's.
        size: (rows, columns) of the images in pixels, instead of the transform's.
        range: (low, high) of the values in files of more than 8 bits; see ``mamba_attn.images.read``.
        classes: names of the outputs, or a file of them: one per line, or JSON.
        head: as in ``LoadedModel``. Default: "softmax".
        layout: as in ``LoadedModel``.
        device: "cpu" or "cuda".
        stand_ins: use ``mamba_attn.cpu_stand_ins`` for your own code: "on", "off", or "auto", where there is no CUDA.
        trust_remote_code: let transformers run the code that lies in the folder.
        options: arguments of the builder.

    Raises:
        ValueError: nothing of this name, a missing device, an invalid option, classes that are not as many as the
            outputs.
        ModelBuildError: your code failed; with its traceback.
        WeightsError: weights are absent, damaged or do not fit.
        UnsupportedModelError: the model fails on an image of its transform.
        ImportError: timm or transformers is needed and not installed.

    Example:
        >>> load("vmamba_micro").classes[3]  # doctest: +SKIP
        'shoes'
    """
    require_device(device)
    given = None if weights is None else str(weights)
    found = _built(spec, given, options, stand_ins, trust_remote_code, device)
    if found.reads == "text":
        of_images = {"transform": transform, "mean": mean, "std": std, "size": size, "range": range, "layout": layout}
        wrong = [f"{name}=" for name, value in of_images.items() if value is not None]
        if wrong:
            raise ValueError(f"load({spec!r}, {', '.join(wrong)}): this model reads text; leave out what is of images.")
        found.model.to(device)
        return found
    if transform is not None:
        found.transform = Transform.of(transform, mean=mean, std=std)
    elif found.transform is None:
        found.transform = _own_transform(found.model, str(found.name), size=size is None, mean=mean is None)
    if size is not None and size != found.transform.size and _fixed(spec):
        rows, columns = found.transform.size
        raise ValueError(
            f"size={size}: {spec} takes only images of {rows},{columns} pixels; give image_size={size[0]} as an option."
        )
    found.transform = Transform.of(found.transform, mean=mean, std=std, size=size)
    if range is not None:
        found.transform = Transform.from_dict({**found.transform.as_dict(), "range": tuple(range)})
    found.head, found.layout = head or found.head, found.layout if layout is None else layout
    found.model.to(device)
    decided("model %s: %s, weights %s, on %s", spec, found.name, found.weights or "its own", device)
    if classes is not None:
        found.classes = read_names(classes)
    found.__post_init__()  # its checks, after the changes
    return complete(found)


def complete(model: nn.Module | LoadedModel) -> LoadedModel:
    """Return a model with its transform and classes, found where they were not given.

    Args:
        model: one made in memory; a ``LoadedModel`` is completed in place.

    Raises:
        ValueError: classes that are not as many as the outputs; a model that reads text.
        UnsupportedModelError: the model fails on an image of its transform.

    Warns:
        UserWarning: the transform was guessed; modules are in training mode that change the answer.

    Example:
        >>> complete(load("vim_digits", weights="demo")).transform.size
        (64, 64)
    """
    found = model if isinstance(model, LoadedModel) else LoadedModel(model)
    if found.reads == "text":
        raise ValueError(
            f"{found.name} reads text, and this is for images; call mamba_attn.explanations.explain_text(model, text)."
        )
    warn_of_training(found.model)
    if found.transform is None:
        found.transform = _own_transform(found.model, str(found.name))
    count = vars(found).get(_OUTPUTS)
    if count is None:
        count = vars(found)[_OUTPUTS] = _outputs(found)
    if found.classes is None:
        found.classes = names_for(count)
    elif len(found.classes) != count and found.classes:
        raise ValueError(
            f"classes: {len(found.classes)} names, {found.classes[0]!r} the first, and {found.name} has {count} "
            "outputs; expected one name per output."
        )
    return found


def require_device(device: str) -> None:
    """Refuse a missing CUDA device.

    Args:
        device: "cpu" or "cuda".

    Raises:
        ValueError: PyTorch sees no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': PyTorch sees no CUDA device here; use device='cpu'.")


def load_companions(names: Sequence[str] | None, subject: LoadedModel, device: str = "cpu") -> list[LoadedModel]:
    """Build the models to show next to another one, with their demo weights.

    Args:
        names: of the models, or "none". Default: for a micro model, the other two.
        subject: the model to compare with.
        device: "cpu" or "cuda".

    Raises:
        ValueError: no model with demo weights of this name, or "none" together with others.
    """
    if names is None:
        names = [name for name in _MICRO if name != subject.spec] if subject.spec in _MICRO else [NO_COMPANION]
    if NO_COMPANION in names:
        if len(names) > 1:
            raise ValueError(f"beside={list(names)}: {NO_COMPANION!r} stands alone.")
        return []
    for name in names:
        if name not in registry.demos():
            raise ValueError(
                f"beside={name!r}: no model with weights in the package. {nearest(name, registry.demos())}"
            )
    found = [load(name, device=device) for name in names]
    for each in found:
        if isinstance(each.transform, Transform) and isinstance(subject.transform, Transform):
            each.transform = replace(each.transform, range=subject.transform.range)  # all read the same files
    return found


def _built(
    spec: str, weights: str | None, options: dict[str, Any], stand_ins: str, trust: bool, device: str
) -> LoadedModel:
    if spec.startswith("timm:"):
        return _of_timm(spec, weights, options)
    if spec.startswith("hf:"):
        return _of_transformers(spec, weights, options, trust)
    if names_code(spec):
        return _of_code(spec, weights, options, stand_ins, device)
    return _of_the_registry(spec, weights, options)


def _of_the_registry(spec: str, weights: str | None, options: dict[str, Any]) -> LoadedModel:
    name = registry.aliases().get(spec, spec)
    if name in registry.names("text"):
        return _of_text(name, "demo" if weights is None else weights, options)
    if name not in registry.names():
        if spec.endswith(".py"):
            raise ValueError(f"load({spec!r}): add the function that returns the model, {spec}:FUNCTION.")
        raise ValueError(f"load({spec!r}): no such model. {nearest(spec, _spellings())} Or give {KINDS}.")
    weights = "demo" if weights is None else weights
    card = registry.demo_card(name) if weights == "demo" else _card(weights)
    built = registry.build(name, weights, {**card.get("options", {}), **options})
    transform = registry.transform(name, cast(tuple[int, int], built.model.image_size))
    count = int(getattr(built.model, "num_classes", 0))
    names = names_for(count, card.get("classes", []), built.classes)
    made = LoadedModel(built.model, transform, names, name=name, spec=name, weights=weights, options=built.options)
    vars(made)[_OUTPUTS] = count
    return made


def _of_text(name: str, weights: str, options: dict[str, Any]) -> LoadedModel:
    card = registry.demo_card(name) if weights == "demo" else {}
    built = registry.build(name, None if weights == "random" else weights, {**card.get("options", {}), **options})
    words = registry.vocabulary(name) if name in registry.demos("text") else None
    found = LoadedModel(built.model, classes=card.get("classes", []), name=name, reads="text", tokenizer=words)
    found.spec, found.weights, found.options = name, weights, built.options
    return found


def _spellings() -> list[str]:
    return [*registry.names(), *registry.names("text"), *registry.aliases()]


def _card(weights: str) -> dict[str, Any]:
    """Return the card next to a file of weights, as ``benchmarks/train.py`` writes it; empty without one."""
    path = Path(weights).with_suffix(".json")
    if weights in ("official", "random") or not path.is_file():
        return {}
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: this card of the weights is not JSON ({error}).") from error
    card = card if isinstance(card, dict) else {"options": None}
    found = {"options": card.get("options", {}), "classes": card.get("classes", [])}
    fits = isinstance(found["options"], dict) and isinstance(found["classes"], list)
    if not fits:
        raise ValueError(f"{path}: expected a card with 'options' (an object) and 'classes' (a list of names).")
    return found


def _of_code(spec: str, weights: str | None, options: dict[str, Any], stand_ins: str, device: str) -> LoadedModel:
    with stand_ins_for(stand_ins, device) as used:
        function = find_function(spec)

        def make(chosen: Mapping[str, Any]) -> LoadedModel:
            return build_model(spec, function, chosen)

        file = None if weights == "random" else weights
        found = _filled(make, lambda option: takes(function, option), options, spec, file)
    if used:
        warnings.warn(f"{spec}: built with CPU stand-ins of {', '.join(used)}.", stacklevel=4)
    place, _, name = spec.rpartition(":")
    found.spec = f"{Path(place).expanduser().resolve()}:{name}" if place.endswith(".py") else spec
    found.stand_ins = bool(used)
    return found


def _of_timm(spec: str, weights: str | None, options: dict[str, Any]) -> LoadedModel:
    name = spec.removeprefix("timm:")
    if importlib.util.find_spec("timm") is None:
        raise ImportError(f"model={spec!r} needs timm: pip install 'mamba_attn[timm]'")
    import timm

    if not timm.is_model(name):
        raise ValueError(f"model={spec!r}: timm has no such model. {nearest(name, timm.list_models())}")
    if weights == "demo":
        raise WeightsError(f"weights='demo': there are none for {spec}; give a file, 'official' or 'random'.")

    def make(chosen: Mapping[str, Any]) -> LoadedModel:
        try:
            model = timm.create_model(name, pretrained=weights == "official", **chosen)
        except (TypeError, RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"model={spec!r}: timm could not build it ({error}).") from error
        sides = _sides(chosen.get("img_size"))
        config: Any = timm.data.config.resolve_model_data_config(model)  # type: ignore[no-untyped-call]
        if sides is not None:
            config = {**config, "input_size": (config["input_size"][0], *sides)}
        return LoadedModel(model.eval(), Transform.of(config), name=name)

    file = None if weights in ("official", "random") else weights
    if weights is None:
        warnings.warn(f"{spec}: its weights are random; give a file, or 'official' to download timm's.", stacklevel=4)
    found = _filled(make, lambda option: option == "num_classes", options, spec, file)
    found.spec, found.weights = spec, weights or "random"
    return found


def _of_transformers(spec: str, weights: str | None, options: dict[str, Any], trust: bool) -> LoadedModel:
    folder = local_path("model", spec.removeprefix("hf:"))
    if not (folder / "config.json").is_file():
        raise ValueError(f"model={spec!r}: there is no {folder / 'config.json'}; expected hf:FOLDER, on this machine.")
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(f"model={spec!r} needs transformers: pip install 'mamba_attn[text]'")
    transformers = importlib.import_module("transformers")

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **local, **options)
        classifies = any("Classification" in name for name in config.architectures or [])
        speaks = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or [])
        kind = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
        kind = transformers.AutoModelForCausalLM if speaks else kind
        random = weights == "random"
        model = (
            kind.from_config(config, trust_remote_code=trust)
            if random
            else kind.from_pretrained(folder, config=config, **local)
        )
        processor = tokenizer = None
        if speaks and any((folder / name).is_file() for name in _TOKENIZERS):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        if (folder / "preprocessor_config.json").is_file():
            processor = transformers.AutoImageProcessor.from_pretrained(folder, **local)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError) as error:
        if not trust and "trust_remote_code" in str(error):
            raise ValueError(
                f"model={spec!r}: this model is built by code that lies in its folder; read it, and if you trust it, "
                "give trust_remote_code=True."
            ) from error
        raise ValueError(f"model={spec!r}: transformers could not load it ({error}).") from error
    labels = getattr(config, "id2label", None) if classifies else None
    names = [str(labels[index]) for index in sorted(labels)] if labels else None
    if not classifies and not trust:
        names = []  # transformers' own backbones return features, which are no classes

    def made(_: Mapping[str, Any]) -> LoadedModel:
        if speaks:
            its = folder.resolve().name
            return LoadedModel(model.eval(), classes=[], name=its, reads="text", tokenizer=tokenizer)
        return LoadedModel(model.eval(), processor, names, name=folder.resolve().name)

    found = _filled(made, lambda _: False, options, spec, None if weights == "random" else weights)
    found.spec, found.weights = f"hf:{folder.resolve()}", weights or ""
    return found


def _filled(
    make: Callable[[Mapping[str, Any]], LoadedModel],
    takes_option: Callable[[str], bool],
    options: dict[str, Any],
    spec: str,
    weights: str | None,
) -> LoadedModel:
    """Build a model and load its weights; where the builder takes it, with the number of classes that the file has."""
    chosen = dict(options)
    found = make(chosen)
    if weights in ("official", "demo", "random"):
        raise WeightsError(f"weights={weights!r}: there are none for {spec}; give a file, or none.")
    if weights is not None:
        checkpoint = checkpoints.Checkpoint(weights)
        expected = found.model.state_dict()
        fit = checkpoint.fit(expected)
        count = _classes_in(fit.tensors, expected)
        if count is not None and "num_classes" not in options and takes_option("num_classes"):
            chosen["num_classes"] = count
            found = make(chosen)
            fit = checkpoint.fit(found.model.state_dict())
        for note in checkpoints.fill(found.model, checkpoint, fit):
            warnings.warn(note, stacklevel=5)
        if found.classes is None and checkpoint.classes:
            found.classes = names_for(len(checkpoint.classes), checkpoint.classes)
        found.weights = str(checkpoint.path)
    found.options = chosen
    return found


def _classes_in(tensors: Mapping[str, Any], expected: Mapping[str, Any]) -> int | None:
    """Return how many classes a file has, if not as many as the model; 0 if it lacks the classifier alone."""
    head = checkpoints.head_of(expected)
    if head is None:
        return None
    if head in tensors:
        count = int(tensors[head].shape[0])
        return None if count == expected[head].shape[0] else count
    own = head.removesuffix("weight")
    return 0 if all(name in tensors or name.startswith(own) for name in expected) else None


def _fixed(spec: str) -> bool:
    """Whether a model of ours takes images of one size only."""
    return spec in registry.names() and not takes(registry.builder(spec), "d_state")


def _own_transform(model: nn.Module, name: str, *, size: bool = True, mean: bool = True) -> Transform:
    """Return a transform from a model's own attributes; say what they do not hold, of what is not given."""
    for attribute in ("pretrained_cfg", "default_cfg"):  # timm's
        config = getattr(model, attribute, None)
        if isinstance(config, Mapping) and config.get("input_size"):
            return Transform.of(config)
    embedding = getattr(model, "patch_embed", None)
    sizes = (
        getattr(model, "image_size", None),
        getattr(model, "img_size", None),
        getattr(embedding, "img_size", None),
        getattr(getattr(model, "config", None), "image_size", None),
    )
    side = next((each for each in map(_sides, sizes) if each is not None), (_SIDE, _SIDE))
    first = next((each for each in model.modules() if isinstance(each, nn.Conv2d)), None)
    grey = first is not None and first.in_channels == 1
    guessed = {
        f"pictures are cropped to {side[0]} x {side[1]} pixels": size,
        f"normalised with ImageNet's mean and standard deviation{' of grey' if grey else ''}": mean,
    }
    if any(guessed.values()):
        missing = [option for option, open_ in (("size=", size), ("mean=", mean), ("std=", mean)) if open_]
        warnings.warn(
            f"{name}: its transform is not known, so {' and '.join(what for what, open_ in guessed.items() if open_)}; "
            f"give {', '.join(missing)} where that is wrong.",
            stacklevel=4,
        )
    found = Transform(side)
    return replace(found, mean=(sum(found.mean) / 3,), std=(sum(found.std) / 3,)) if grey else found


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    listed = list(size) if isinstance(size, Sequence | torch.Size) else []
    return (int(listed[-2]), int(listed[-1])) if len(listed) >= 2 else None


def _outputs(model: LoadedModel) -> int:
    """Return the number of scores that a model gives for an image; 0 for one that gives none."""
    blank = model.transform.blank().to(model.device)
    try:
        with undisturbed(model.model):
            output = model.model(blank)
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"{model.name}: it fails on an image of its transform, {tuple(blank.shape)}: {type(error).__name__}: "
            f"{str(error).rstrip('.')}. If it takes images of another size, give size=(rows, columns)."
        ) from error
    logits = model.scores(output, len(blank))
    several = find_scores(output, len(blank))[1]
    if logits is None and model.classes is None and len(several) > 1 and several[0].tensor.ndim == 2:
        warnings.warn(
            f"{model.name}: it returned {described(output)}, and any of these could be its scores, so it is taken as a "
            "model without classes; for maps of a class, wrap it in a module that returns one of them.",
            stacklevel=4,
        )
    return 0 if logits is None else logits.shape[1]
