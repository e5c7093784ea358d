"""What an intervention does to one layer: entries of its matrix removed, or another matrix in its place.

y[i] = sum_j M[i, j] u[j] + D u[i]. Without some columns, y is the scan of an input that is zero there, and D u: one
more scan, however many columns, and no difference of large numbers. Rows that lose other columns take other scans. What
is more than some steps back reaches a step through the state before them, which decays from there: it is read off the
states, in linear time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from mamba_attn import ops
from mamba_attn._types import Float
from mamba_attn.core.attention_record import AttentionRecord
from mamba_attn.core.scan_record import ScanRecord
from mamba_attn.errors import UnsupportedModelError
from mamba_attn.ops import reference
from mamba_attn.ops.blocked import per_channel
from mamba_attn.tracing.layer_names import by_pattern

Positions = int | Iterable[int] | Tensor | None
Removed = tuple[Tensor, Tensor]  # rows, and what they do not read; both True there


@dataclass(frozen=True, eq=False)
class Knockout:
    """Entries of a layer's matrix that are removed: those of some rows and columns, of some routes and channels.

    Args:
        rows: tokens that lose what they read; numbers, or True per token or per image and token; None: all.
        columns: tokens that are not read; as ``rows``.
        routes: numbers; None: all.
        channels: numbers of channels, or of heads of softmax attention; None: all.
    """

    rows: list[int] | Tensor | None
    columns: list[int] | Tensor | None
    routes: list[int] | None
    channels: list[int] | None

    @classmethod
    def of(cls, rows: Positions, columns: Positions, routes: Positions, channels: Positions) -> "Knockout":
        """Check the types.

        Raises:
            TypeError: no numbers, and no mask.
        """
        return cls(
            _positions("rows", rows, mask=True),
            _positions("columns", columns, mask=True),
            _numbers("routes", routes),
            _numbers("channels", channels),
        )

    @property
    def empty(self) -> bool:
        """Whether nothing is removed."""
        chosen = (self.rows, self.columns, self.routes, self.channels)
        return any(its is not None and not (bool(its.any()) if isinstance(its, Tensor) else its) for its in chosen)

    def removed(self, name: str, record: ScanRecord | AttentionRecord) -> Removed:
        """Return rows (batch or 1, tokens) and columns (batch or 1, routes or 1, channels or 1, tokens).

        Args:
            name: of the layer, for messages.
            record: the layer's.

        Raises:
            ValueError: a position that is not there, a mask of another shape.
        """
        scans = isinstance(record, ScanRecord)
        device = record.source_delta.device if isinstance(record, ScanRecord) else record.device
        rows, columns = (
            _mask(name, what, its, record, device) for what, its in (("rows", self.rows), ("columns", self.columns))
        )
        columns = columns[:, None, None]
        for what, axis, its, count in (
            ("routes", 1, self.routes, record.routes if isinstance(record, ScanRecord) else 1),
            ("channels", 2, self.channels, record.channels if isinstance(record, ScanRecord) else record.heads),
        ):
            if its is not None:
                chosen = torch.zeros(count, dtype=torch.bool, device=device)
                unit = what if scans or what == "routes" else "heads"
                chosen[[_in_range(name, what, unit, number, count) for number in its]] = True
                columns = columns & chosen.view(*[1] * axis, -1, *[1] * (3 - axis))
        return rows, columns


@dataclass(frozen=True, eq=False)
class Replacement:
    """Another matrix.

    Args:
        matrix: broadcasts over (batch, routes, channels, tokens, tokens); one, or by patterns of layers' names.
    """

    matrix: Tensor | Mapping[str, Tensor]
    empty = False

    @classmethod
    def of(cls, matrix: Any) -> "Replacement":
        """Check the types.

        Raises:
            TypeError: neither a floating-point tensor nor several by name.
            ValueError: a tensor that is no matrix.
        """
        given = list(matrix.values()) if isinstance(matrix, Mapping) else [matrix]
        for each in given:
            if not isinstance(each, Tensor) or not each.is_floating_point():
                raise TypeError(
                    "replace_attention(matrix=...): expected a floating-point tensor, or several by the layers' names, "
                    f"got {type(each).__name__ if not isinstance(each, Tensor) else each.dtype}."
                )
            if not 2 <= each.ndim <= 5 or each.shape[-1] != each.shape[-2]:
                raise ValueError(
                    f"replace_attention(matrix={tuple(each.shape)}): expected (tokens, tokens), with channels, routes "
                    "and batch before them where they differ."
                )
        return cls(matrix)

    def of_layer(self, name: str, record: ScanRecord | AttentionRecord) -> Float[Tensor, "_ _ _ tokens tokens"]:
        """Return the matrix with all its axes; some of size 1.

        Args:
            name: of the layer.
            record: the layer's.

        Raises:
            ValueError: it does not fit the layer, or none was given for it.
        """
        found = by_pattern(self.matrix, name) if isinstance(self.matrix, Mapping) else self.matrix
        if found is None:
            raise ValueError(
                f"replace_attention(matrix=...): there is none for {name}; give one, or leave it out of layers=."
            )
        if isinstance(record, ScanRecord):
            frame = (record.batch, record.routes, record.channels, record.tokens, record.tokens)
            device = record.source_delta.device
        else:
            frame = (record.batch, 1, record.heads, record.tokens, record.tokens)
            device = record.device
        whole = found.reshape(*[1] * (5 - found.ndim), *found.shape)
        sides = whole.shape[-2:] == frame[-2:]
        if not sides or any(own not in (1, size) for own, size in zip(whole.shape[:3], frame[:3], strict=True)):
            raise ValueError(
                f"replace_attention(matrix={tuple(found.shape)}): {name} takes what broadcasts over (batch, routes, "
                f"channels, tokens, tokens) = {frame}, as layer.attention('each', routes='each') returns it."
            )
        return whole.to(device)


@dataclass(frozen=True)
class Within:
    """Entries more than some steps back in their route's own order are removed.

    Args:
        steps: that remain, besides the token itself.
    """

    steps: int
    empty = False

    @classmethod
    def of(cls, beyond: Any, others: Sequence[Any]) -> "Within":
        """Check the arguments of ``knockout``.

        Raises:
            TypeError: no whole number.
            ValueError: below 0, or along with entries that are named.
        """
        if isinstance(beyond, bool) or not isinstance(beyond, Integral):
            raise TypeError(f"knockout(beyond={beyond!r}): expected a whole number of steps.")
        if beyond < 0:
            raise ValueError(f"knockout(beyond={beyond!r}): expected at least 0 steps.")
        if any(each is not None for each in others):
            raise ValueError(
                f"knockout(beyond={beyond!r}): leave out rows, columns, routes and channels; blocks may be nested."
            )
        return cls(int(beyond))


Edit = Knockout | Replacement | Within


@dataclass(frozen=True, eq=False)
class CallEdit:
    """What is done to one call of a scan at a door, whose groups may be routes.

    Args:
        removed: rows (sequences, groups, length), and inputs (sequences, groups, width or 1, length).
        matrix: in scan order, (sequences or 1, groups, width or 1, length, length).
        within: so many steps back are kept.
    """

    removed: Removed | None = None
    matrix: Tensor | None = None
    within: int | None = None


def edited_call(
    parts: Any, y: Float[Tensor, "sequences channels length"], edits: Sequence[CallEdit]
) -> Float[Tensor, "sequences channels length"]:
    """Return the output of one call of a scan under interventions, before its gate.

    Args:
        parts: what the call was given, ``ScanParts``.
        y: its output.
        edits: as in ``edited_scan``.
    """
    found: Tensor = y.unflatten(1, parts.u.shape[1:3]).to(parts.u.dtype)
    skip = 0 if parts.D is None else parts.D.unsqueeze(-1) * parts.u
    matrices = [edit.matrix.to(found) for edit in edits if edit.matrix is not None]
    within = min((edit.within for edit in edits if edit.within is not None), default=None)
    _refuse_both("a scan", bool(matrices), within)

    def product(kept: Tensor) -> Tensor:
        if matrices:
            return times(matrices[-1], kept)
        own: Tensor = ops.selective_scan(kept, *parts[1:5])
        return own if within is None else own - far(ScanRecord.from_scan(kept, *parts[1:5]), within)

    if matrices or within is not None:
        found = product(parts.u) + skip
    for rows, columns in distinct([edit.removed for edit in edits if edit.removed is not None]):
        found = torch.where(rows.unsqueeze(2), product(parts.u.masked_fill(columns, 0)) + skip, found)
    return found.flatten(1, 2)


def edited_scan(
    name: str, record: ScanRecord, y: Float[Tensor, "batch channels tokens"], edits: Sequence[Edit]
) -> Tensor:
    """Return the scans' merged output under interventions.

    Args:
        name: of the layer, for messages.
        record: its record.
        y: the scans' merged output.
        edits: of replacements the last counts; knockouts take entries from whatever matrix there is.
    """
    skip = _skip(record, y)
    matrix = _matrix(name, record, edits)
    within = min((edit.steps for edit in edits if isinstance(edit, Within)), default=None)
    _refuse_both(name, matrix is not None, within)
    if matrix is not None:
        y = _applied(record, matrix.to(y.dtype), None) + skip
    elif within is not None:
        y = _near(record.replace(D=None), within).to(y.dtype) + skip
    for rows, columns in distinct(_removed(name, record, edits)):
        if matrix is not None:
            other = _applied(record, matrix.to(y.dtype), columns)
        else:
            removed, source = at_steps(record, columns), record.source_u
            source = source.expand(-1, max(removed.shape[1], source.shape[1]), -1, -1).masked_fill(removed, 0)
            scan = record.replace(source_u=source, D=None)
            other = ops.selective_scan(scan) if within is None else _near(scan, within)
        y = torch.where(rows[:, None], other + skip, y)
    return y


def edited_probabilities(name: str, record: AttentionRecord, edits: Sequence[Edit]) -> Tensor:
    """Return the probabilities (batch, heads, tokens, tokens) under interventions; nothing is normalised again.

    Raises:
        UnsupportedModelError: entries are to be removed by their steps.
    """
    if any(isinstance(edit, Within) for edit in edits):
        raise UnsupportedModelError(
            f"knockout(beyond=...): {name} is softmax attention, whose tokens have no steps; name scans with layers=."
        )
    found, matrix = record.probabilities, _matrix(name, record, edits)
    if matrix is not None:
        found = matrix[:, 0].to(found.dtype).expand_as(found)
    for rows, columns in _removed(name, record, edits):
        found = found.masked_fill(rows[:, None, :, None] & columns[:, 0, :, None], 0)
    return found


def far(record: ScanRecord, steps: int) -> Float[Tensor, "batch routes channels length"]:
    """What the outputs of a scan owe to inputs more than some steps back, in scan order.

    C_i exp(A (delta_{i - steps} + ... + delta_i)) h_{i - steps - 1}: the state before those steps, as it has decayed.

    Args:
        record: of the scans.
        steps: from 0 on.
    """
    h, lag = ops.scan_states(record), steps + 1
    found = h.new_zeros(*h.shape[:3], h.shape[-1])
    if lag >= h.shape[-1]:
        return found
    part = per_channel(record, h.dtype)
    total = part.delta.double().cumsum(-1)
    gap = (total[..., lag:] - total[..., :-lag]).to(h.dtype)
    decay = torch.exp(gap.unsqueeze(3) * part.A.unsqueeze(-1))
    found[..., lag:] = (part.C[..., lag:] * decay * h[..., :-lag]).sum(3)
    return found


def _near(record: ScanRecord, steps: int) -> Float[Tensor, "batch channels tokens"]:
    """The merged output of scans of which each step reads so many steps back."""
    whole: Tensor = ops.selective_scan(record)
    return whole - reference.merge_tokens(record, far(record, steps)).to(whole.dtype)


def _refuse_both(name: str, replaced: bool, within: int | None) -> None:
    if replaced and within is not None:
        raise ValueError(
            f"knockout(beyond={within}): the matrix of {name} is replaced, and another matrix has no steps; set its "
            "entries to zero instead."
        )


def at_steps(record: ScanRecord, columns: Tensor) -> Tensor:
    """Put what is removed where the record has its inputs: (batch or 1, routes or 1, channels or 1, positions).

    Args:
        record: of the scans.
        columns: in the token frame.
    """
    return columns if record.source_frame == "tokens" else in_scan_order(columns, record.read_order)


def in_scan_order(values: Tensor, order: Tensor) -> Tensor:
    """Gather (batch or 1, routes or 1, width, tokens) along orders: (batch or 1, routes, width, length)."""
    order = (order if order.ndim == 3 else order[None]).clamp(min=0).unsqueeze(2)
    shape = [max(a, b) for a, b in zip(values.shape[:3], order.shape[:3], strict=True)]
    return values.expand(*shape, -1).gather(-1, order.expand(*shape, -1))


def distinct(removed: Sequence[Removed]) -> Iterator[Removed]:
    """Yield the rows that lose the same, each with all that it loses.

    Args:
        removed: of several knockouts, which may overlap.
    """
    kind: Any = sum(rows.long() << number for number, (rows, _) in enumerate(removed))
    for code in kind.unique().tolist() if removed else ():
        its = [columns for number, (_, columns) in enumerate(removed) if code >> number & 1]
        if its:
            total = its[0]
            for more in its[1:]:
                total = total | more
            yield kind == code, total


def _removed(name: str, record: ScanRecord | AttentionRecord, edits: Sequence[Edit]) -> list[Removed]:
    return [edit.removed(name, record) for edit in edits if isinstance(edit, Knockout)]


def _matrix(name: str, record: ScanRecord | AttentionRecord, edits: Sequence[Edit]) -> Tensor | None:
    found = [edit for edit in edits if isinstance(edit, Replacement)]
    return found[-1].of_layer(name, record) if found else None


def _skip(record: ScanRecord, y: Tensor) -> Tensor:
    """D u, in the token frame."""
    if record.D is None:
        return y.new_zeros(())
    if record.D.ndim == 3:
        return reference.add_skip(record, torch.zeros_like(y))
    return reference.merge_tokens(record, record.D.to(y.dtype).unsqueeze(-1) * record.u.to(y.dtype))


def _applied(record: ScanRecord, matrix: Tensor, columns: Tensor | None) -> Float[Tensor, "batch channels tokens"]:
    """A matrix per route times the input of each route's tokens, which include the record's scale."""
    order = record.read_order if record.read_order.ndim == 3 else record.read_order[None]
    u = record.u.to(matrix.dtype)
    index = order.where(order >= 0, record.tokens).unsqueeze(2).expand_as(u)
    frame = u.new_zeros(*u.shape[:3], record.tokens + 1).scatter(-1, index, u)[..., :-1]
    frame = frame if columns is None else frame.masked_fill(columns, 0)
    return times(matrix, frame).sum(1)


def times(matrix: Float[Tensor, "_ _ _ n n"], u: Float[Tensor, "batch routes channels n"]) -> Tensor:
    """Return matrix @ u, channel by channel; a matrix that channels or images share is not repeated."""
    if matrix.shape[2] == 1:
        shared: Tensor = (matrix[:, :, 0] @ u.mT).mT
        return shared
    if matrix.shape[0] == 1:
        images: Tensor = (matrix[0] @ u.permute(1, 2, 3, 0)).permute(3, 0, 1, 2)
        return images
    return (matrix @ u.unsqueeze(-1)).squeeze(-1)


def _positions(what: str, given: Any, mask: bool = False) -> list[int] | Tensor | None:
    if isinstance(given, Tensor) and given.dtype == torch.bool and mask and given.ndim in (1, 2):
        return given
    if given is None:
        return None
    if isinstance(given, Tensor):
        given = given.tolist() if not given.is_floating_point() and given.dtype != torch.bool else given
    found = [given] if isinstance(given, Integral) else given
    known = isinstance(found, Iterable) and not isinstance(found, str | Tensor | Mapping)
    listed: list[Any] = list(found) if known else [None]
    if any(isinstance(each, bool) or not isinstance(each, Integral) for each in listed):
        masks = ", or True and False per token (a tensor of bool)" if mask else ""
        raise TypeError(f"knockout({what}={given!r}): expected a number or several, from 0 or from the end{masks}.")
    return [int(each) for each in listed]


def _numbers(what: str, given: Any) -> list[int] | None:
    found = _positions(what, given)
    return None if found is None or isinstance(found, Tensor) else found


def _mask(
    name: str, what: str, given: list[int] | Tensor | None, record: ScanRecord | AttentionRecord, device: torch.device
) -> Tensor:
    """True at the chosen tokens: (batch or 1, tokens)."""
    batch, tokens = record.batch, record.tokens
    if given is None:
        return torch.ones(1, tokens, dtype=torch.bool, device=device)
    if isinstance(given, Tensor):
        if tuple(given.shape) not in ((tokens,), (1, tokens), (batch, tokens)):
            raise ValueError(
                f"knockout({what}={tuple(given.shape)}): {name} has {batch} x {tokens} tokens; expected a mask of "
                f"{(tokens,)} or {(batch, tokens)}."
            )
        return given.to(device).view(-1, tokens)
    found = torch.zeros(1, tokens, dtype=torch.bool, device=device)
    found[:, [_in_range(name, what, "tokens", number, tokens) for number in given]] = True
    return found


def _in_range(name: str, what: str, unit: str, number: int, count: int) -> int:
    if not -count <= number < count:
        raise ValueError(
            f"knockout({what}={number}): {name} has {count} {unit}; expected {-count}..{count - 1}, where negative "
            "numbers count from the end."
        )
    return number
