"""The commands as functions of a model in memory: ``mamba_attn.collect``, ``compare`` and ``explore``.

``mamba_attn.explain`` is that of ``mamba_attn.explanations``.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from mamba_attn.core.loaded_model import LoadedModel
from mamba_attn.core.requirements import require_extras, writable
from mamba_attn.datasets.loading import complete
from mamba_attn.datasets.memory import as_data

if TYPE_CHECKING:
    from mamba_attn.analytics import AttentionStore
    from mamba_attn.evaluation.summary import Table


def collect(
    model: nn.Module | LoadedModel,
    data: Any,
    store: str | Path,
    *,
    limit: int | None = None,
    keep: int | Sequence[str] = 0,
    batch: int | None = None,
    layers: Any = None,
    routes: str = "each",
    features: int | str | None = None,
) -> "AttentionStore":
    """Save the attention of a model over many images in a store, and open it; as ``mamba-attn collect`` does.

    Args:
        model: your network, or a ``LoadedModel`` with its transform and classes.
        data: a folder, zip or part of one; a tensor of the model's input; a list of files or Pillow images; a
            DataLoader, whose tensors are the model's input.
        store: a new folder, or a store to resume.
        limit: use the first N images. Default: all.
        keep: number of first images whose matrices are stored in full, or names of such images.
        batch: images at once. Default: what the matrices' size allows.
        layers: names, patterns or numbers. Default: all.
        routes: statistics of "each" route, or of their "sum" alone.
        features: number of first images whose features and pixels are stored, or "all"; the statistics are of all.
            Default: 10,000, or as many as an existing store says.

    Returns:
        The store, which knows this model.

    Raises:
        StoreError: the folder holds something else.
        UnsupportedModelError: a model that cannot be traced.
        ValueError, TypeError: arguments that do not fit.

    Example:
        >>> collect(model, "photos", "store").images[0].predicted  # doctest: +SKIP
        'hat'
    """
    require_extras({"zarr": "zarr", "PIL": "pillow"}, "analytics")
    from mamba_attn.analytics import AttentionStore, Request
    from mamba_attn.analytics import collect as run

    loaded = complete(model)
    request = Request(loaded, data, limit, keep, batch, layers, routes=routes, features=features)
    run(request, store)
    return AttentionStore.open(store, model=loaded)


def compare(
    models: nn.Module | LoadedModel | Sequence[nn.Module | LoadedModel],
    data: Any,
    out: str | Path | None = None,
    *,
    methods: Sequence[str] | str = ("all",),
    measures: Sequence[str] | None = None,
    target: int | str = "predicted",
    limit: int | None = None,
    seed: int = 0,
) -> "list[Table]":
    """Score attribution methods on models, as ``mamba-attn compare`` does.

    Args:
        models: one or several networks, or a ``LoadedModel`` each; their names must differ.
        data: as in ``collect``; tensors are the input of the first model. For models that read text: a file with one
            text per line, a list of texts, or the task "copying" or "recall".
        out: folder for the page, the tables, and the measurements from which the same call resumes. Default: nothing
            is kept.
        methods: names, with options after a colon, or "all" that fit.
        measures: some of ``mamba_attn.evaluation.plan.MEASURES``, or of ``mamba_attn.evaluation.texts.MEASURES``.
            Default: all.
        target: the class, by name or number, "predicted" or "label".
        limit: use the first N images. Default: all.
        seed: of all random numbers.

    Returns:
        A table per model.

    Raises:
        ValueError: two models of one name; a method that fits no model.
        UnsupportedModelError: a model that cannot be traced.

    Example:
        >>> compare([model, vit], "photos", methods=["raw_attention"])[0].images  # doctest: +SKIP
        50
    """
    require_extras({"captum": "captum", "PIL": "pillow", "rich": "rich"})
    from mamba_attn.commands.compare import write
    from mamba_attn.commands.compare_texts import STORE
    from mamba_attn.evaluation.plan import MEASURES, Plan
    from mamba_attn.evaluation.scheduler import run
    from mamba_attn.evaluation.specs import Model, Options, choose_methods
    from mamba_attn.evaluation.store import Store
    from mamba_attn.evaluation.summary import summarise

    given = [models] if isinstance(models, nn.Module | LoadedModel) else list(models)
    if any(isinstance(each, LoadedModel) and each.reads == "text" for each in given):
        return _on_texts(given, data, out, methods, measures, target, limit, seed)
    loaded = [complete(each) for each in given]
    names = [each.name for each in loaded]
    if not loaded or len(set(names)) < len(names):
        raise ValueError(f"compare(models={names}): expected models of different names; give LoadedModel(name=...).")
    shown = as_data(data, loaded[0])
    chosen, most, unasked = choose_methods([methods] if isinstance(methods, str) else list(methods))
    plan = Plan(
        [Model.of(each) for each in loaded],
        [shown.identity],
        chosen,
        tuple(MEASURES if measures is None else measures),
        most=most,
        unasked=unasked,
        options=Options(str(target), seed=seed),
        limit=limit,
    )
    vars(plan)["data"] = {shown.identity: shown}
    plan.check()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) if out is None else writable(str(out))
        store = Store(folder / STORE)
        run(plan, store)
        tables = summarise(plan, store)
        if out is not None:
            write(plan, store, tables, folder, f"mamba_attn.compare([{', '.join(map(str, names))}], ...)")
    return tables


def _on_texts(
    given: Sequence[nn.Module | LoadedModel],
    data: Any,
    out: str | Path | None,
    methods: Sequence[str] | str,
    measures: Sequence[str] | None,
    target: int | str,
    limit: int | None,
    seed: int,
) -> "list[Table]":
    from mamba_attn.commands.compare_texts import compared_texts, text_plan
    from mamba_attn.evaluation.specs import Model, choose_methods

    models = [each for each in given if isinstance(each, LoadedModel) and each.reads == "text"]
    names = [str(each.name) for each in models]
    if len(models) < len(given) or len(set(names)) < len(names):
        raise ValueError(f"compare(models={names}): expected models that all read text, of different names.")
    if target != "predicted":
        raise ValueError(f"compare(target={target!r}): on texts, methods explain the model's prediction; leave it out.")
    chosen, _, unasked = choose_methods([methods] if isinstance(methods, str) else list(methods))
    task_or_file = isinstance(data, str | Path)
    texts = [str(data)] if task_or_file else [tuple(data)]
    plan = text_plan([Model.of(each) for each in models], texts, chosen, unasked, measures, None, limit, seed)
    return compared_texts(plan, out, f"mamba_attn.compare([{', '.join(names)}], ...)")


def explore(*stores: "AttentionStore | str | Path", host: str = "127.0.0.1", port: int = 8050) -> None:
    """Explore stores in a browser until Ctrl+C, as ``mamba-attn explore`` does.

    Args:
        stores: folders, or opened stores, which know their model.
        host: address to bind to.
        port: 0 for any free one.

    Raises:
        StoreError: a folder holds no store.
        OSError: the port is in use.

    Example:
        >>> explore("store")  # doctest: +SKIP
    """
    from mamba_attn.commands.explore import NEEDED, serve

    require_extras(NEEDED, "app")
    from mamba_attn.analytics import AttentionStore

    serve([each if isinstance(each, AttentionStore) else AttentionStore.open(each) for each in stores], host, port)
