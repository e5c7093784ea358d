"""Shared by all callbacks: the open stores with their views, and parsing of the browser's values."""

from collections.abc import Sequence
from typing import Any

from werkzeug.exceptions import BadRequest

from mamba_attn.viewer.captions import fitting
from mamba_attn.viewer.source import Source
from mamba_attn.viewer.state import Pane, State
from mamba_attn.viewer.views import Views


class Context:
    """The open stores and their views.

    Args:
        sources: one per store.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._views = [Views(source) for source in sources]

    def views(self, pane: Pane) -> Views:
        """Return the views of the pane's store."""
        return self._views[min(max(pane.store, 0), len(self._views) - 1)]

    def pane(self, inputs: Any) -> Pane:
        """Return the pane that the controls describe, limited to what its store has.

        Args:
            inputs: one entry of ``ctx.inputs_list`` or ``ctx.states_list``.

        A value that no control offers ends the request with status 400.
        """
        given = {item["id"]["set"]: item.get("value") for item in inputs}
        plain = Pane()
        for name, value in list(given.items()):
            if isinstance(getattr(plain, name, None), bool):
                given[name] = value == ["on"]
            elif value is None:
                del given[name]
        try:
            pane = Pane.parsed(given)
        except ValueError as error:
            raise BadRequest(str(error)) from error
        return fitting(self.views(pane).source, pane)

    def panes(self, inputs: Any) -> tuple[Pane, ...]:
        """Return all panes that the page's controls describe, in order."""
        numbers = sorted({item["id"]["pane"] for item in inputs})
        return tuple(self.pane([item for item in inputs if item["id"]["pane"] == number]) for number in numbers)

    def state(self, panes: Sequence[Pane], selection: Any) -> State:
        """Return the state made of panes and of the store "selection".

        An invalid selection ends the request with status 400.
        """
        plain = State().to_json()
        given = selection if isinstance(selection, dict) else {}
        given_panes = [State(panes=(pane,)).to_json()["panes"][0] for pane in panes]
        try:
            return State.from_json({**plain, **given, "panes": given_panes})
        except ValueError as error:
            raise BadRequest(str(error)) from error

    @staticmethod
    def selection(state: State) -> dict[str, Any]:
        """Return the value for the store "selection": the state without its panes."""
        given = state.to_json()
        del given["panes"]
        return given
