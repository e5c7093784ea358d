"""The findings of arXiv 2502.20764 as measurements: each with its question, the paper's claim and its function.

Attention is the signed mean over channels, or heads, between patches, routes summed. Numbers of single images come from
each image's matrix; numbers of rows come from mean matrices of groups of images, because averaging over
images cancels their content.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mamba_attn.errors import nearest
from mamba_attn.findings import formulas

VERSION = 2  # of the measurements; results of older versions are measured again
GROUPS = formulas.GROUPS
LEAST = 16  # patches, for a finding about rows


@dataclass(frozen=True)
class Finding:
    """One measurement.

    Args:
        name: of the finding.
        of: the finding of the paper that it stands for, F1 to F7; "" for one that the paper does not state.
        title: in a table.
        question: that it answers.
        kind: the input of ``function``: "matrix" (shares of images, places), "rows" (rows of a mean matrix, places),
            "features" (the ``Spread`` of a block's features), "blocks" (a stage), "depth" (numbers of blocks).
        claim: the paper's claim about a trained model: a sign and a number; None without a claim.
        function: computes it; its docstring has the formula.
        source: the finding that a "depth" is about.

    Example:
        >>> FINDINGS["block_silhouette"].of, FINDINGS["block_silhouette"].claim
        ('F1', ('>', 0.5))
    """

    name: str
    of: str
    title: str
    question: str
    kind: str
    claim: tuple[str, float] | None
    function: Callable[..., Any]
    source: str = ""

    @property
    def level(self) -> str:
        """What the finding gives one number for: a "block", a "stage" or the "model"."""
        return {"blocks": "stage", "depth": "model"}.get(self.kind, "block")


def _finding(of: str, title: str, kind: str, claim: str, function: Callable[..., Any], question: str) -> Finding:
    sign, _, number = claim.partition(" ")
    return Finding(function.__name__, of, title, question, kind, (sign, float(number)) if claim else None, function)


def _depth(of: str, source: str, title: str, claim: str, question: str) -> Finding:
    sign, _, number = claim.partition(" ")
    return Finding(
        f"{source}_by_depth",
        of,
        title,
        question,
        "depth",
        (sign, float(number)) if claim else None,
        formulas.by_depth,
        source,
    )


FINDINGS: dict[str, Finding] = {
    each.name: each
    for each in (
        _finding(
            "F1",
            "silhouette of blocks",
            "blocks",
            "> 0.5",
            formulas.block_silhouette,
            "Do the blocks of a stage form clusters of their own?",
        ),
        _finding(
            "F1",
            "nearest point of the same block",
            "blocks",
            "> 0.95",
            formulas.block_neighbours,
            "Is an image's matrix nearest to others of the same block?",
        ),
        _finding(
            "F2",
            "read just before / uniform",
            "matrix",
            "> 1",
            formulas.preceding_lift,
            "Do patches read those just before them in a scan?",
        ),
        _finding(
            "F3",
            "low correlation of two blocks",
            "blocks",
            "< 0",
            formulas.block_correlation,
            "Do two blocks of a stage complement each other?",
        ),
        _finding(
            "F3",
            "range of distances over blocks",
            "blocks",
            "",
            formulas.distance_range,
            "Do some blocks of a stage look far and others near?",
        ),
        _finding(
            "F3",
            "share of neighbours and self",
            "matrix",
            "",
            formulas.neighbour_share,
            "How much is read from the patch itself and its neighbours?",
        ),
        _finding(
            "F4",
            "cosine, same less other column",
            "rows",
            "> 0",
            formulas.column_similarity,
            "Do patches of one column read alike?",
        ),
        _finding(
            "F4",
            "cosine, same less other row",
            "rows",
            "",
            formulas.row_similarity,
            "Do patches of one row read alike?",
        ),
        _finding(
            "F4",
            "purity of columns",
            "rows",
            "> 0",
            formulas.column_purity,
            "Are the patches that read most alike in one column?",
        ),
        _finding(
            "F4", "purity of rows", "rows", "", formulas.row_purity, "Are the patches that read most alike in one row?"
        ),
        _finding(
            "F7",
            "purity of z-blocks",
            "rows",
            "",
            formulas.block_purity,
            "Are the patches that read most alike in one z-block?",
        ),
        _finding(
            "F5",
            "rows follow the image",
            "rows",
            "> 0",
            formulas.grid_locality,
            "Do patches that are close in the image read alike?",
        ),
        _finding(
            "F5",
            "rows follow the scan",
            "rows",
            "> 0",
            formulas.sequence_locality,
            "Do patches that are close in a scan read alike?",
        ),
        _finding(
            "F7",
            "own order over raster",
            "rows",
            "> 0",
            formulas.order_over_raster,
            "Does the pattern follow the order that is scanned, rather than the raster?",
        ),
        _finding(
            "F6",
            "part that differs by image",
            "features",
            "",
            formulas.image_share,
            "How much of a block's attention depends on the image?",
        ),
        _finding("", "entropy", "matrix", "", formulas.entropy, "How widely is attention spread?"),
        _finding("", "mean attention distance, px", "matrix", "", formulas.distance, "How far does attention reach?"),
        _depth(
            "F6",
            "image_share",
            "part that differs, by depth",
            "> 0",
            "Does attention depend more on the image in later blocks?",
        ),
        _depth(
            "F6",
            "grid_locality",
            "rows follow the image, by depth",
            "< 0",
            "Does the order of patches fade in later blocks?",
        ),
        _depth("", "distance", "mean distance, by depth", "", "Do later blocks look farther?"),
        _depth("", "entropy", "entropy, by depth", "", "Is attention spread more widely in later blocks?"),
    )
}


def of_kind(kind: str) -> list[Finding]:
    """Return the findings of a kind.

    Args:
        kind: see ``Finding``.
    """
    return [each for each in FINDINGS.values() if each.kind == kind]


def finding(name: str) -> Finding:
    """Return the finding of a name.

    Args:
        name: of the finding.

    Raises:
        ValueError: no such finding.
    """
    if name not in FINDINGS:
        raise ValueError(f"finding({name!r}): no such finding. {nearest(name, FINDINGS)}")
    return FINDINGS[name]
