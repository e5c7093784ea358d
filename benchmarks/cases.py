"""What is measured: shapes, the rows of the tables with what they should reach, and the calls themselves.

Every call is built by a function that returns it ready to run, so that a child process can build it by name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel.inputs import Shape, inputs
from benchmarks.kernel.targets import Target

Call = Callable[[], object]


VIM = Shape(384, 16, 197)  # one direction of one Vim-T layer
LINEAR = Shape(384, 16, 1024)
LENGTHS = (1024, 4096, 16384, 65536)
SCALES = (1e-3, 0.1, 1.0, 10.0)
# few channels, so that the float64 reference fits the memory
ERRORS = (
    Shape(16, 16, 197),
    Shape(32, 1, 197),
    Shape(8, 16, 784),
    Shape(16, 1, 784),
    Shape(4, 16, 3136),
    Shape(8, 1, 3136),
)
MODELS = ("vim_tiny", "vmamba_tiny_s1l8")
TRANSFORMER = "deit_tiny_patch16_224"

FORMS: dict[str, dict[str, bool]] = {"rows": {"rollout": False}, "dense": {}, "signed": {"signed": True}}
EXPLAINED = ("vim_micro", "vmamba_micro")
TRIPLES = (  # methods whose maps are made of one pass
    ("raw_attention", "attention_rollout_signed", "mamba_attribution"),
    ("raw_attention", "attention_rollout", "mamba_attribution"),
)
DIGITS = ("vim_digits", "vmamba_digits")
ON_DIGITS = {"miou": "mIoU of digits"}
AIMS = {
    "positive_auc_top": "positive AUC (lower is better)",
    "negative_auc_top": "negative AUC (higher is better)",
    "miou": "mIoU of boxes",
}

TARGETS = {
    "loop": Target(f"published triple loop / ours, {VIM}", 80, 400, higher=True, unit="x"),
    "formula": Target(f"ours / VMamba's published formula, {VIM}", 2, 1, unit="x"),
    "error": Target("error against float64 / sum of absolute terms, delta x 1e-3 to 10, L to 3136", 1e-5, 1e-6),
    "heads 64": Target("a fold of one Mamba-2 layer, 24 heads of 64, 128 states, L 64", 3, 1, unit="ms"),
    "heads 256": Target("a fold of one Mamba-2 layer, 24 heads of 64, 128 states, L 256", 40, 10, unit="ms"),
    "text law": Target("language models: error of the matrices times u (law 1), with padding and without", 1e-6, 3e-7),
    "text logits": Target("language models: error of traced logits, with padding and without", 1e-6, 5e-7),
    "text padding": Target("language models: rows and columns of padding, in sum", 0, 0),
    "text cut": Target(
        "language models: matrices of a padded text, cut to its tokens, against the text alone", 1e-6, 5e-7
    ),
    "text hybrids": Target("hybrids, scans and softmax traced: error of traced logits", 1e-6, 5e-7),
    "text half": Target(
        "language models in bfloat16: error of traced logits / the model's own error", 1.3, 1, unit="x"
    ),
    "text time": Target("6 layers of 768 features: traced forward / transformers' own", 0.6, 0.4, unit="x"),
    "lens": Target("matrices of TransformerLens and ours: largest relative difference", 1e-5, 1e-6),
    "lens time": Target("pass and all matrices: time, ours / TransformerLens", 1, 0.3, unit="x"),
    "lens memory": Target("pass and all matrices: peak memory, ours / TransformerLens", 1, 0.1, unit="x"),
    "text row time": Target("a token's rows, 1,024 to 65,536 tokens: log-log slope of time", 1.1, 1.02),
    "text row memory": Target("a token's rows, 1,024 to 65,536 tokens: log-log slope of memory", 1.1, 1.02),
    "text rows": Target("last rows of all layers, mamba-130m's width, 4,096 tokens: memory", 0.5e9, 0.1e9, unit="B"),
    "spills": Target("bytes that the CUDA kernels spill on sm_80, sm_90 and sm_120, all together", 0, 0),
    "Vim-S attention slots": Target(
        "attention of 24 layers of Vim-S, batch 8: issue slots / an H100's", 14, 10, unit="ms"
    ),
    "Vim-S scan slots": Target("scans of 24 layers of Vim-S, batch 8: issue slots / an H100's", 1.3, 0.8, unit="ms"),
    "kernel error": Target("error of the CUDA source, run on a host / plain PyTorch's", 2, 1, unit="x"),
    "vim_tiny": Target("vim_tiny forward / DeiT-tiny forward", 8, 5, unit="x"),
    "vim_tiny attention": Target("attention of all 24 layers added / DeiT-tiny forward", 12, 9, unit="x"),
    "vmamba_tiny_s1l8": Target("vmamba_tiny_s1l8 forward / DeiT-tiny forward", 12, 8, unit="x"),
    "vmamba_tiny_s1l8 attention": Target("attention of all 14 blocks added / DeiT-tiny forward", 12, 9, unit="x"),
    "vmamba_tiny_s1l8 memory": Target("extra peak memory of that attention", 1e9, 0.5e9, unit="B"),
    "two threads": Target("attention of all layers, 224 pixels: wall seconds, two threads / one", 0.65, 0.55, unit="x"),
    "first call": Target("the native kernel's first call, prebuilt / compiled then", 0.1, 0.02, unit="x"),
    "row time": Target("one row, 1,024 to 65,536 tokens: log-log slope of time", 1.15, 1.05),
    "row memory": Target("one row: log-log slope of peak extra memory", 1.15, 1.05),
    "product time": Target("one left product: log-log slope of time", 1.15, 1.05),
    "product memory": Target("one left product: log-log slope of peak extra memory", 1.15, 1.05),
    "text areas": Target("area between LeRF and MoRF on film reviews, words replaced by <unk>", 0.3, 0.6, higher=True),
    "text truth": Target("the token an answer was copied from has the first rank", 0.98, 1, higher=True),
    "drop-in law 1": Target("other people's model code: worst error of the matrices times u (law 1)", 1e-5, 1e-6),
    "drop-in output": Target("other people's model code: worst error of the traced output", 1e-5, 1e-6),
    "drop-in changed": Target("other people's model code: outputs that observing changed by a bit", 0, 0),
    "drop-in failed": Target("other people's model code: modules and models that could not be traced", 0, 0),
    "drop-in logits": Target("our model / the official code, same weights: largest difference of logits", 1e-4, 1e-5),
    "drop-in matrices": Target("our model / the official code, same weights: worst error of a matrix", 1e-5, 1e-6),
    "doors overhead": Target(
        "other people's models traced at doors, no attention / their own forward", 1.05, 1.02, unit="x"
    ),
    "doors look": Target("the look at a model ahead of its first pass / its own forward", 2, 1.5, unit="x"),
    "doors orders": Target("the orders of a model's tokens, measured at doors, once, CPU seconds", 20, 10, unit="s"),
    "collect memory": Target("`mamba-attn collect`: added peak memory, 1,000 / 100 images", 1.05, 1.01, unit="x"),
    "collect time": Target("`mamba-attn collect`, 1,000 images, wall seconds", 600, 300, unit="s"),
    "collect mean": Target("error of the store's means / largest entry, against explicit matrices", 1e-6, 1e-7),
    "scale ranks": Target(
        "torchrun with 2 ranks / 1, `mamba-attn collect` of vmamba_micro", 1.8, 1.9, higher=True, unit="x"
    ),
    "scale equal": Target("arrays that differ in a bit between numbers of ranks", 0, 0),
    "scale error": Target("statistics of 7 parts / of one, largest difference", 1e-14, 2e-15),
    "scale kills": Target("arrays that differ in a bit after random kills", 0, 0),
    "scale redone": Target("parts that a kill loses, per rank", 1, 1),
    "scale commit": Target("counting a part of a store, milliseconds", 50, 10, unit="ms"),
    "scale commit bytes": Target("counting a part of a store, kilobytes", 200, 100, unit="kB"),
    "scale opening": Target("opening a store", 1, 0.2, unit="s"),
    "scale opening memory": Target("opening a store, added memory", 200, 50, unit="MB"),
    "scale compare twice": Target("`mamba-attn compare`: figures that several ranks measured twice", 0, 0),
    "scale compare equal": Target("`mamba-attn compare`: figures of two ranks that differ from one process's", 0, 0),
    "scale planning": Target("`mamba-attn compare`: listing what is to be measured, CPU seconds", 2, 1, unit="s"),
    "scale bootstrap": Target("`mamba-attn compare`: resampling a table, added memory", 300, 200, unit="MB"),
    "scale findings memory": Target("`mamba-attn findings`: memory that more images add", 50, 10, unit="MB"),
    "embed kept": Target("neighbours that 100 principal components keep", 0.8, 0.95, higher=True),
    "embed trust": Target("what PCA-100 before the embedding adds to its trustworthiness", 0, 0, higher=True),
    "embed overlap": Target("what PCA-100 before the embedding adds to the neighbours it keeps", 0, 0, higher=True),
    "findings orders": Target("`mamba-attn findings`: patch orders that models were trained in", 5, 7, higher=True),
    "findings families": Target("`mamba-attn findings`: families of Mamba models", 2, 2, higher=True),
    "explore median": Target("`mamba-attn explore`, 56 x 56 patches: gesture to picture, median", 200, 100, unit="ms"),
    "explore 95": Target("the same, 95th percentile", 200, 100, unit="ms"),
    "explore first": Target("`mamba-attn explore`: address to first picture", 2000, 1000, unit="ms"),
    "explore bytes": Target("the same, received until then", 1500, 500, unit="kB"),
    "explain": Target("`mamba-attn explain` with its defaults, wall seconds", 60, 20, unit="s"),
    **{
        f"{name} rows": Target(f"{name}: MambaAttribution's row form / one forward + backward", 1.3, 1.1, unit="x")
        for name in EXPLAINED
    },
    **{
        f"{name} one pass": Target(f"{name}: three maps of one traced pass / the dearest of them", 1.3, 1.1, unit="x")
        for name in EXPLAINED
    },
    **{
        f"{name} {aim}": Target(
            f"{name}: {what}, lead of `RelevanceAttentionRanks` over the best other method",
            0,
            0,
            higher=True,
            unit="points" if aim == "miou" else "AUC points",
        )
        for name, aims in [*((name, AIMS) for name in EXPLAINED), *((name, ON_DIGITS) for name in DIGITS)]
        for aim, what in aims.items()
    },
    **{
        f"{name} {part}": Target(f"{name}: {what}", at_least, aim, higher=True, unit="x")
        for name in ("vim_micro", "vmamba_micro")
        for part, what, at_least, aim in (
            ("energy", "energy of the map inside the objects' boxes / their area", 1.25, 1.6),
            ("deletion", "drop of the probability, highest 20 % of the cells deleted / random 20 %", 1.5, 2.5),
        )
    },
}


def usable_backends() -> list[str]:
    """Backends that can run float32 on this machine, without the slow specification."""
    from mamba_attn.ops import BACKENDS
    from mamba_attn.ops.arguments import as_record

    record = as_record("benchmark", None, *inputs(Shape(2, 2, 2))).record
    return [name for name, backend in BACKENDS.items() if name != "reference" and not backend.unavailable(record)]


def attention(shape: Shape, backend: str | None = None, scale: float = 1.0) -> Call:
    """Our channel mean."""
    from mamba_attn import ops

    values = inputs(shape, scale)
    return lambda: ops.hidden_attention(*values, fold="mean", backend=backend)


def loop(shape: Shape) -> Call:
    """The published loops, and the channel mean."""
    from benchmarks.kernel.published import triple_loop

    values = inputs(shape)
    return lambda: triple_loop(*values).mean(1)


def formula(shape: Shape, scale: float = 1.0) -> Call:
    """VMamba's published formula."""
    from benchmarks.kernel.published import vmamba_formula

    values = inputs(shape, scale)
    return lambda: vmamba_formula(*values)


def line(what: str, channels: int, states: int, length: int) -> Call:
    """One row (the last) or one left product; ready: code loaded and run once on few tokens."""
    from mamba_attn import ops

    def call(shape: Shape) -> Call:
        values = inputs(shape)
        if what == "row":
            return lambda: ops.attention_row(*values, row=shape.length - 1)
        vector = torch.randn(1, shape.length, generator=torch.Generator().manual_seed(1))
        return lambda: ops.left_product(*values, vector=vector)

    call(Shape(channels, states, 16))()
    return call(Shape(channels, states, length))


def forward(name: str, attention: bool = False, pixels: int = 224) -> Call:
    """A model's forward on one image, without gradients; with ``attention`` every layer's matrix is made and read."""
    model = _model(name, pixels)
    image = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    return _traced(model, image) if attention else _plain(model, image)


def matrices(name: str, batch: int, pixels: int = 224) -> Call:
    """The attention of all layers of a model, one after the other, from a traced pass that is not part of it.

    Args:
        name: of the model; its weights are random.
        batch: images.
        pixels: their side.
    """
    import mamba_attn

    model = _model(name, pixels)
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), mamba_attn.trace(model) as trace:
        model(images)
    scans = [layer.scan for layer in trace.scans.values()]

    @torch.no_grad()
    def run() -> object:
        for scan in scans:
            mamba_attn.hidden_attention(scan)
        return scans

    return run


def explained(name: str, what: str, batch: int, pixels: int = 128) -> Call:
    """A model's pass over some images, or a map of each by one form of MambaAttribution.

    Args:
        name: of the model; its weights are random.
        what: "forward", "forward + backward" (to the images), or one of ``FORMS``.
        batch: images.
        pixels: their side.
    """
    model = _model(name, pixels)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, pixels, pixels, generator=generator)
    if what == "forward":
        return _plain(model, images)
    if what != "forward + backward":
        from mamba_attn.attribution import MambaAttribution

        method = MambaAttribution(model, **FORMS[what])
        return lambda: method.attribute(images, 0)

    def run() -> object:
        inputs = images.clone().requires_grad_()
        return torch.autograd.grad(model(inputs)[:, 0].sum(), inputs)

    return run


def three_maps(name: str, methods: tuple[str, ...], batch: int, pixels: int = 128) -> dict[str, Call]:
    """Several maps of the same images: all from one traced pass ("one pass"), and each from a pass of its own.

    Args:
        name: of the model; its weights are random.
        methods: in the catalogue.
        batch: images.
        pixels: their side.
    """
    from mamba_attn.attribution import attribute_together, catalogue

    model = _model(name, pixels)
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    built = {method: catalogue.build(method, model) for method in methods}

    def together() -> object:
        return attribute_together(list(built.values()), images, 0)

    def alone(method: str) -> Call:
        return lambda: built[method].attribute(images, 0)

    return {"one pass": together, **{method: alone(method) for method in methods}}


def _model(name: str, pixels: int) -> Any:
    torch.manual_seed(0)
    if name == TRANSFORMER:
        import timm

        return timm.create_model(name, img_size=pixels).eval()
    import mamba_attn.models

    return mamba_attn.models.create(name, image_size=pixels)


def _plain(model: Any, image: Tensor) -> Call:
    @torch.no_grad()
    def run() -> object:
        return model(image)

    return run


def _traced(model: Any, image: Tensor) -> Call:
    import mamba_attn

    @torch.no_grad()
    def run() -> object:
        with mamba_attn.trace(model, attention="mean") as trace:
            logits = model(image)
        return logits, [trace[name].attention() for name in trace]

    return run
