"""Which doors a model's code can reach: compiled scans and torch's attention, looked for by the names in the code."""

import operator
import sys
import weakref
from collections.abc import Collection, Iterator
from inspect import unwrap
from types import CodeType, FunctionType, ModuleType
from typing import Any, ClassVar

from torch import nn

from mamba_attn.tracing.running import modules_of

_DEPTH = 4  # a model's file names a mixer's, that one a function's, and that one a compiled module
_NO_DOORS = ("torch", "builtins", "numpy", "timm", "transformers", "einops", "typing", "functools")
_PREFIXES = ("selective_scan", "v2dmamba_scan")  # of the extensions' names; the second is 2DMamba's other recurrence
CHUNK_SCANS = ("_mamba_chunk_scan_combined_fwd", "_mamba_chunk_scan_combined_bwd")  # of mamba_ssm's ssd_combined
_ATTENTION = frozenset(
    (
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "eager_attention_forward",
        "ALL_ATTENTION_FUNCTIONS",
    )
)
_OF_TORCH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class _Loaded:
    """The loaded modules, as they were when they were last looked at."""

    values: ClassVar[list[Any]] = []
    modules: ClassVar[list[ModuleType]] = []
    names: ClassVar[list[dict[str, Any]]] = []
    times: ClassVar[int] = 0  # that one came or went


def loaded_modules() -> tuple[list[ModuleType], list[int]]:
    """Return the loaded modules, and numbers that change when one comes, goes, or gets another name."""
    values = list(sys.modules.values())
    if len(values) != len(_Loaded.values) or not all(map(operator.is_, values, _Loaded.values)):
        modules = [module for module in values if issubclass(type(module), ModuleType)]
        _Loaded.values, _Loaded.modules, _Loaded.names = values, modules, list(map(vars, modules))
        _Loaded.times += 1
    return _Loaded.modules, [_Loaded.times, *map(len, _Loaded.names)]


def compiled_scans() -> list[ModuleType]:
    """Return the modules with a compiled scan, or a stand-in of one, that any loaded module is or holds.

    Stand-ins leave ``sys.modules`` when their block ends, and live on in the modules that imported them.
    """
    global _last
    modules, loaded = loaded_modules()
    if loaded == _last[0]:
        return [value for reference in _last[1] if (value := reference()) is not None]
    found: dict[int, ModuleType] = {}
    for module in modules:
        names = vars(module)
        known = _looked_at.get(module)
        if known is None or known[0] != len(names):
            held = [value for value in [module, *list(names.values())] if _is_compiled_scan(value)]
            known = _looked_at[module] = (len(names), [weakref.ref(value) for value in held])
        for reference in known[1]:
            value = reference()
            if value is not None:
                found[id(value)] = value
    _last = loaded, [weakref.ref(value) for value in found.values()]
    return list(found.values())


def reaches_a_door(model: nn.Module, modules: Collection[nn.Module] | None = None) -> bool:
    """Whether a compiled scan can be found from the code of a model's modules, by the names in it.

    Args:
        model: a model, or a mixer.
        modules: its modules, where they are known.
    """
    # scans are kept there, too, and the file of a stand-in may be gone
    modules = list(modules_of(model).values() if modules is None else modules)
    now = loaded_modules()[1], [(id(module), type(module), len(vars(module))) for module in modules]
    before = _reaches.get(model)
    if before is None or before[0] != now:
        before = _reaches[model] = now, _reaches_a_door(modules)
    return before[1]


_reaches: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, bool]]" = weakref.WeakKeyDictionary()


def _reaches_a_door(modules: list[nn.Module]) -> bool:
    files = {sys.modules.get(cls.__module__) for module in modules for cls in type(module).__mro__}
    held = (value for module in modules for value in (*vars(module).values(), type(module).forward))
    functions = (_names_behind(value) for value in held if isinstance(value, FunctionType))
    seen = {id(names): names for names in (*map(vars, files - {None}), *functions) if names is not None}
    waiting = list(seen.values())
    for _ in range(_DEPTH):
        further: list[dict[str, Any]] = []
        for names in waiting:
            if str(names.get("__name__")).partition(".")[0] in _NO_DOORS:
                continue
            if CHUNK_SCANS[0] in names:
                return True
            for value in list(names.values()):
                if _is_compiled_scan(value):
                    return True
                found = _names_behind(value)
                if found is not None and id(found) not in seen:
                    seen[id(found)] = found
                    further.append(found)
        waiting = further
    return any(_is_compiled_scan(module) for name, module in list(sys.modules.items()) if name.startswith(_PREFIXES))


def _names_behind(value: Any) -> dict[str, Any] | None:
    """The namespace of the code that a name stands for."""
    if isinstance(value, FunctionType):
        return getattr(unwrap(value), "__globals__", None)
    if isinstance(value, type):
        return getattr(sys.modules.get(value.__module__), "__dict__", None)
    return vars(value) if issubclass(type(value), ModuleType) else None


def _is_compiled_scan(value: Any) -> bool:
    # isinstance would ask the value for its class, and some modules answer by warnings
    if not issubclass(type(value), ModuleType):
        return False
    names = vars(value)
    if value.__name__.rpartition(".")[2].startswith(_PREFIXES):
        return callable(names.get("fwd")) and callable(names.get("bwd"))
    return all(isinstance(names.get(name), FunctionType) for name in CHUNK_SCANS)


_looked_at: "weakref.WeakKeyDictionary[ModuleType, tuple[int, list[weakref.ref[ModuleType]]]]"
_looked_at = weakref.WeakKeyDictionary()
_last: tuple[list[int], list[weakref.ref[ModuleType]]] = [], []  # what was loaded, and held


def reaches_attention(model: nn.Module, outside: Collection[nn.Module] = ()) -> bool:
    """Whether the code of a model's modules names a door of attention, itself or in a function that it calls.

    Args:
        model: a model, or a part of one.
        outside: modules that are not looked at, nor what is inside them.
    """
    hidden = {part for module in outside for part in module.modules()}
    for module in modules_of(model).values():
        if module in hidden:
            continue
        kind = type(module)
        if kind not in _known:
            _known[kind] = issubclass(kind, _OF_TORCH) or _names_attention(kind)
        if _known[kind]:
            return True
    return False


_known: "weakref.WeakKeyDictionary[type, bool]" = weakref.WeakKeyDictionary()


def _names_attention(kind: type) -> bool:
    own = [each for each in kind.__mro__ if not each.__module__.startswith(("torch.", "builtins"))]
    functions = [value for each in own for value in vars(each).values() if isinstance(value, FunctionType)]
    seen: set[CodeType] = set()
    return any(_leads_there(function, _DEPTH, seen) for function in functions)


def _leads_there(function: FunctionType, depth: int, seen: set[CodeType]) -> bool:
    function = unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen or function.__module__.startswith("torch."):
        return False
    seen.add(code)
    names = set(_names_in(code))
    if names & _ATTENTION:
        return True
    values = [function.__globals__[name] for name in names if name in function.__globals__]
    values += [vars(v).get(name) for v in values if issubclass(type(v), ModuleType) for name in names]
    values += [v for each in values if isinstance(each, type) for v in vars(each).values()]
    functions = [value for value in values if isinstance(value, FunctionType)]
    return depth > 0 and any(_leads_there(each, depth - 1, seen) for each in functions)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
