"""Which doors a model's code can reach: compiled scans and torch's attention, looked for by the names in the code."""

import sys
import weakref
from collections.abc import Collection, Iterable, Iterator
from inspect import unwrap
from itertools import count
from operator import is_
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from mamba_attn.tracing.running import modules_of

_DEPTH = 4  # a model's file names a mixer's, that one a function's, and that one a compiled module
_NO_DOORS = ("torch", "builtins", "numpy", "timm", "transformers", "einops", "typing", "functools")
# nobody puts a door under a new name into these libraries' modules, and they are most of those that are loaded
_FINISHED = {*sys.stdlib_module_names, "torch", "numpy", "scipy", "sympy"}
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


class Loaded(NamedTuple):
    """The loaded modules, as they were when they were looked at.

    Args:
        modules: the modules.
        number: another one when a module has come or gone since, or has more names or fewer.
        values: of ``sys.modules``.
        names: those that the modules hold, where others may come to stand there.
        sizes: how many these are.
    """

    modules: list[ModuleType]
    number: int
    values: list[Any]
    names: list[dict[str, Any]]
    sizes: list[int]


def loaded_modules(just_now: Loaded | None = None) -> Loaded:
    """Return the loaded modules; to look at each of some thousands takes its time.

    Args:
        just_now: what the same trace found, which stands until something is imported.
    """
    global _loaded
    if just_now is not None and len(just_now.values) == len(sys.modules):
        return just_now
    values, last = list(sys.modules.values()), _loaded
    if len(values) != len(last.values) or not all(map(is_, values, last.values)):
        modules = [module for module in values if issubclass(type(module), ModuleType)]
        names = [own for own in map(vars, modules) if str(own.get("__name__")).partition(".")[0] not in _FINISHED]
        _loaded = Loaded(modules, next(_numbers), values, names, list(map(len, names)))
    elif (sizes := list(map(len, last.names))) != last.sizes:
        _loaded = last._replace(number=next(_numbers), sizes=sizes)
    return _loaded


_numbers = count()
_loaded = Loaded([], next(_numbers), [], [], [])


def compiled_scans(loaded: Loaded | None = None) -> list[ModuleType]:
    """Return the modules with a compiled scan, or a stand-in of one, that any loaded module is or holds.

    Stand-ins leave ``sys.modules`` when their block ends, and live on in the modules that imported them.

    Args:
        loaded: the loaded modules, where they were just looked at.
    """
    global _last
    loaded = loaded or loaded_modules()
    if loaded.number == _last[0]:
        return [value for reference in _last[1] if (value := reference()) is not None]
    found: dict[int, ModuleType] = {}
    for module in loaded.modules:
        names = vars(module)
        known = _looked_at.get(module)
        if known is None or known[0] != len(names):
            held = [value for value in [module, *list(names.values())] if _is_compiled_scan(value)]
            known = _looked_at[module] = (len(names), [weakref.ref(value) for value in held])
        for reference in known[1]:
            value = reference()
            if value is not None:
                found[id(value)] = value
    _last = loaded.number, [weakref.ref(value) for value in found.values()]
    return list(found.values())


class _Answer(NamedTuple):
    """Whether something leads to a door, of what this was said, and of which functions; none of it is kept alive."""

    of: Any
    functions: "list[weakref.ref[FunctionType]]"
    reached: bool

    def holds(self, of: Any, functions: Iterable[FunctionType] | None) -> bool:
        """Whether it is still true, where other functions than before would matter.

        That a door is reached stays so: to open it for nothing changes nothing.
        """
        if self.of != of:
            return False
        if self.reached or functions is None:
            return True
        return self.functions == list(map(weakref.ref, functions))


def reaches_a_door(
    model: nn.Module, modules: Collection[nn.Module] | None = None, loaded: Loaded | None = None
) -> bool:
    """Whether a compiled scan can be found from the code of a model's modules, by the names in it.

    Args:
        model: a model, or a mixer.
        modules: its modules, where they are known.
        loaded: the loaded modules, where they were just looked at.
    """
    # scans are kept there, too, and the file of a stand-in may be gone
    modules = list(modules_of(model).values() if modules is None else modules)
    loaded = loaded or loaded_modules()
    kinds, sizes = list(map(type, modules)), list(map(len, map(vars, modules)))
    now = loaded.number, list(map(weakref.ref, modules)), list(map(weakref.ref, kinds)), sizes
    before = _reaches.get(model)
    if before is None or not before.holds(now, _held_functions(modules) if compiled_scans(loaded) else None):
        functions = list(_held_functions(modules))
        reached = _reaches_a_door(modules, functions)
        before = _reaches[model] = _Answer(now, list(map(weakref.ref, functions)), reached)
    return before.reached


_reaches: "weakref.WeakKeyDictionary[nn.Module, _Answer]" = weakref.WeakKeyDictionary()


def _held_functions(modules: Collection[nn.Module]) -> Iterator[FunctionType]:
    """The functions that stand on modules themselves, methods put there included, and the forwards of their classes."""
    kinds = {kind: kind.__module__.startswith("torch.nn.modules.") for kind in {type(module) for module in modules}}
    for module in modules:
        own = vars(module)
        for value in (own.get("forward"),) if kinds[type(module)] else own.values():
            if type(value) is FunctionType:
                yield value
            elif type(value) is MethodType and type(value.__func__) is FunctionType:
                yield value.__func__
    yield from (kind.forward for kind in kinds if type(kind.forward) is FunctionType)


def _reaches_a_door(modules: list[nn.Module], functions: Iterable[FunctionType]) -> bool:
    files = {sys.modules.get(cls.__module__) for module in modules for cls in type(module).__mro__}
    held = (_names_behind(function) for function in functions)
    seen = {id(names): names for names in (*map(vars, files - {None}), *held) if names is not None}
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
    loaded = sys.modules.copy()  # a list of its items may be interrupted, by other threads' imports, too
    return any(_is_compiled_scan(module) for name, module in loaded.items() if name.startswith(_PREFIXES))


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
_last: tuple[int, list[weakref.ref[ModuleType]]] = -1, []  # number of what was loaded, and held


def reaches_attention(
    model: nn.Module, outside: Collection[nn.Module] = (), modules: Collection[nn.Module] | None = None
) -> bool:
    """Whether the code of a model's modules names a door of attention, itself or in a function that it calls.

    Args:
        model: a model, or a part of one.
        outside: modules that are not looked at, nor what is inside them.
        modules: the model's, where they are known.
    """
    modules = modules_of(model).values() if modules is None else modules
    if outside:
        hidden = {part for module in outside for part in modules_of(module).values()}
        modules = [module for module in modules if module not in hidden]
    if any(_names_attention(kind) for kind in dict.fromkeys(map(type, modules))):
        return True
    own = (vars(module).get("forward") for module in modules)  # put on the instance
    functions = (value.__func__ if type(value) is MethodType else value for value in own if value is not None)
    return any(type(each) is FunctionType and _leads_there(each, _DEPTH, set()) for each in functions)


_known: "weakref.WeakKeyDictionary[type, _Answer]" = weakref.WeakKeyDictionary()


def _names_attention(kind: type) -> bool:
    if issubclass(kind, _OF_TORCH):
        return True
    before = _known.get(kind)
    if before is None or not before.holds(None, _own_functions(kind)):
        functions = list(_own_functions(kind))
        seen: set[CodeType] = set()
        reached = any(_leads_there(function, _DEPTH, seen) for function in functions)
        before = _known[kind] = _Answer(None, list(map(weakref.ref, functions)), reached)
    return before.reached


def _own_functions(kind: type) -> Iterator[FunctionType]:
    """What a class and those that it comes from define, but for torch's."""
    own = [each for each in kind.__mro__ if not each.__module__.startswith(("torch.", "builtins"))]
    return (value for each in own for value in vars(each).values() if isinstance(value, FunctionType))


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
