"""What depends on a model's input: walks of the autograd graph."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from torch import Tensor

Edge = tuple[Any, int]  # a node of the graph and the number of its output


class Sources:
    """The tensors that a forward pass starts from, and what depends on them.

    A parameter requires a gradient, too, so that the graph alone tells what depends on the input.

    Attributes:
        tensors: the sources.
        words: whether the model is given whole numbers, so that what it looks up by them is a source.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.words = False

    def __contains__(self, tensor: object) -> bool:
        """Whether a tensor depends on one of the sources."""
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return False
        if tensor.grad_fn is None:
            return any(tensor is source for source in self.tensors)
        return self._reached_from(tensor.grad_fn)

    def _is_source(self, node: Any) -> bool:
        return any(node is source.grad_fn for source in self.tensors if source.grad_fn is not None)

    def _is_leaf(self, node: Any) -> bool:
        return _holds_leaf(node) and any(node.variable is source for source in self.tensors)

    def _reached_from(self, start: Any) -> bool:
        """Whether a node depends on a source; nodes remember it, so that each is walked once."""
        waiting = [start]
        while waiting:
            node = waiting[-1]
            if self in node.metadata:
                waiting.pop()
                continue
            further, found = [], self._is_source(node)
            for following, _ in node.next_functions:
                if following is None or found:
                    continue
                known = self._is_leaf(following) if _holds_leaf(following) else following.metadata.get(self)
                found = found or bool(known)
                if known is None:
                    further.append(following)
            if found or not further:
                node.metadata[self] = found
                waiting.pop()
            else:
                waiting += further
        return bool(start.metadata[self])

    def flow_past(self, end: Tensor, cut: Collection[Edge]) -> bool:
        """Whether a gradient of ``end`` reaches a source on a way that does not lead through the cut.

        Args:
            end: any tensor.
            cut: edges of the graph.
        """
        for node in _walk(end.grad_fn, lambda edge: edge in cut or edge[0].metadata.get(self) is False):
            if self._is_source(node) or self._is_leaf(node):
                return True
        return False


def edge_of(tensor: Tensor) -> Edge:
    """Where the gradient of a tensor arrives in the graph."""
    return tensor.grad_fn, tensor.output_nr


def behind(tensors: Iterable[Tensor]) -> set[Any]:
    """All nodes of the graph that some tensors were computed by."""
    return {node for tensor in tensors for node in _walk(tensor.grad_fn, lambda edge: False)}


def _walk(start: Any, stops: Callable[[Edge], bool]) -> Iterator[Any]:
    waiting, seen = [] if start is None else [start], set()
    while waiting:
        node = waiting.pop()
        yield node
        for edge in node.next_functions:
            if edge[0] is not None and edge not in seen and not stops(edge):
                seen.add(edge)
                waiting.append(edge[0])


def _holds_leaf(node: Any) -> bool:
    return bool(node.name() == "torch::autograd::AccumulateGrad")
