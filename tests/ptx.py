"""What NVRTC makes of the kernels, on the host: every PTX instruction becomes a C++ statement, every thread a fiber.

``tests/emulation.py`` compiles the source; this runs what ships: inlining, unrolling, fused multiply-adds, address
arithmetic, the control words of shuffles and the fragments of the matrix unit, by the tables of the PTX ISA. What an
instruction does is written in ptx_runtime.hpp. An instruction that is not known here is an error, never skipped.
"""

import ctypes
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mamba_attn.ops.cuda import cubins
from mamba_attn.ops.cuda.nvrtc import compiler
from tests import emulation

KERNELS = (
    "selective_scan",
    "selective_scan_backward",
    "attention_direct",
    "attention_factored_64",
    "attention_factored_128",
    "attention_heads",
    "attention_line",
)
ARCHITECTURE = 90
FLAGS = ("-O1", "-std=c++20", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-w")

_TYPES = {
    **{f"{kind}{bits}": f"{name}{bits}_t" for bits in (8, 16, 32, 64)
       for kind, name in (("u", "uint"), ("b", "uint"), ("s", "int"))},
    "f16": "uint16_t", "f32": "float", "pred": "bool",
}  # fmt: skip
_SPECIAL = {
    "%tid.x": "threadIdx.x",
    "%ntid.x": "blockDim.x",
    "%ctaid.x": "blockIdx.x",
    "%nctaid.x": "gridDim.x",
    "%laneid": "(threadIdx.x % 32)",
}
_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%", "and": "&", "or": "|", "xor": "^"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_MMA = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
_ENTRY = re.compile(r"\.visible \.entry (\w+)\(\s*\.param[^\n]*?\w+\[\d+\]\s*\)(.*?)\n\{\n(.*?)\n\}\n", re.S)
_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);")


class UnknownInstructionError(Exception):
    """PTX that this translator does not speak."""


@dataclass
class Kernel:
    """A translated kernel.

    Args:
        name: of the entry.
        code: the body of a C++ function.
        opcodes: of every basic block, in the order of the blocks' counters.
    """

    name: str
    code: str
    opcodes: list[list[str]] = field(default_factory=list)


def ptx(architecture: int = ARCHITECTURE) -> str:
    """What NVRTC makes of the sources for an architecture."""
    image = cubins.image("hidden_attention.cu", f"compute_{architecture}", compiler())
    return image.rstrip(b"\0").decode()


def translate(text: str, only: str | None = None) -> list[Kernel]:
    """The kernels of a PTX file, or one of them, as C++.

    Raises:
        UnknownInstructionError: the file holds something that is not known here.
    """
    return [_kernel(name, body) for name, _, body in _ENTRY.findall(text) if only in (None, name)]


def _kernel(name: str, body: str) -> Kernel:
    kernel = Kernel(name, "")
    declared: list[str] = []
    lines: list[str] = []
    fresh = True  # the next instruction begins a basic block
    for raw in body.splitlines():
        line = re.sub(r"//.*", "", raw).strip()
        if not line or line in "{}" or line.startswith(".pragma"):
            continue
        if found := re.fullmatch(r"\.reg \.(\w+)\s+%(\w+?)<(\d+)>;", line):
            names = ", ".join(f"r_{found[2]}{i} = 0" for i in range(int(found[3])))
            declared.append(f"{_TYPES[found[1]]} {names};")
        elif found := re.fullmatch(r"\$(\w+):", line):
            lines.append(f"{found[1]}:;")
            fresh = True
        elif found := _INSTRUCTION.fullmatch(line):
            negated, predicate, opcode, rest = found.groups()
            if fresh:
                lines.append(f"COUNT({len(kernel.opcodes)});")
                kernel.opcodes.append([])
            kernel.opcodes[-1].append(opcode)
            fresh = opcode in ("ret", "bra", "bra.uni")
            statement = _statement(opcode, [part.strip() for part in re.split(r",(?![^{]*\})", rest) if part.strip()])
            lines.append(f"if ({negated}{_register(predicate)}) {{ {statement} }}" if predicate else statement)
        else:
            raise UnknownInstructionError(line)
    kernel.code = "\n".join(declared + lines)
    return kernel


def _statement(opcode: str, arguments: list[str]) -> str:
    parts = opcode.split(".")
    rule = _RULES.get(parts[0])
    statement = rule and rule(parts, arguments)
    if not statement:
        raise UnknownInstructionError(f"{opcode} {', '.join(arguments)}")
    return statement


def _register(name: str) -> str:
    if not re.fullmatch(r"%[a-z]+\d+", name):
        raise UnknownInstructionError(f"register {name}")
    return f"r_{name[1:]}"


def _value(text: str, kind: str) -> str:
    """A register, special register or number, read as a type."""
    if text in _SPECIAL:
        return f"(uint32_t){_SPECIAL[text]}"
    if text.startswith("%"):
        return f"as<{_TYPES[kind]}>({_register(text)})"
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return f"as<float>(0x{text[2:]}u)"
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        number = int(text.rstrip("U"), 0)
        return f"({_TYPES[kind]})({number}{'ll' if number < 2**63 else 'ull'})"
    if text == "shared_memory":
        return "0u"
    if text.endswith("_param_0"):
        return "(uint64_t)parameters"
    raise UnknownInstructionError(f"operand {text}")


def _address(text: str, space: str) -> str:
    found = re.fullmatch(r"\[(.+?)(?:\+(-?\d+))?\]", text)
    if found is None:
        raise UnknownInstructionError(f"address {text}")
    base, offset = found[1], int(found[2] or 0)
    if space == "shared":
        start = "0" if base == "shared_memory" else f"(int64_t)(int32_t){_register(base)}"
        return f"shared_at({start} + ({offset}))"
    return f"({_value(base, 'u64')} + ({offset}))"


def _set(register: str, value: str) -> str:
    return f"put({_register(register)}, {value});"


def _vector(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")]


def _wrapping(kind: str, left: str, sign: str, right: str) -> str:
    """An integer sum, difference or product: C++'s signed ones must not overflow, the device's wrap."""
    wide = "uint64_t" if kind.endswith("64") else "uint32_t"
    return f"({_TYPES[kind]})(({wide}){left} {sign} ({wide}){right})"


def _memory(parts: list[str], arguments: list[str]) -> str | None:
    space = next((part for part in parts if part in ("param", "shared", "global")), None)
    if space is None:
        return None
    loads, kind = parts[0] == "ld", parts[-1]
    values, place = arguments if loads else arguments[::-1]
    registers, where, c = _vector(values), _address(place, space), _TYPES[kind]
    lines = [] if space == "param" else [f"aligned({where}, {len(registers)} * sizeof({c}));"]
    for at, register in enumerate(registers):
        memory = f"*({c}*)({where} + {at} * sizeof({c}))"
        lines.append(_set(register, memory) if loads else f"{memory} = {_value(register, kind)};")
    return f"{{ {' '.join(lines)} }}"


def _atomic(parts: list[str], arguments: list[str]) -> str | None:
    if not {"global", "add"} <= set(parts):
        return None
    c = _TYPES[parts[-1]]
    place, value = arguments[-2:]
    change = (
        f"{c}* at = ({c}*){_address(place, 'global')}; const {c} old = *at; *at = old + {_value(value, parts[-1])};"
    )
    return f"{{ {change} {_set(arguments[0], 'old') if parts[0] == 'atom' else ''} }}"


def _move(parts: list[str], arguments: list[str]) -> str:
    kind = parts[-1]
    to, source = arguments
    if to.startswith("{"):  # halves of a 64-bit register
        words = ("(uint32_t)both", "(uint32_t)(both >> 32)")
        puts = [_set(name, word) for name, word in zip(_vector(to), words, strict=True) if name != "_"]
        return f"{{ const uint64_t both = {_value(source, kind)}; {' '.join(puts)} }}"
    if source.startswith("{"):
        low, high = (_value(word, "u32") for word in _vector(source))
        return _set(to, f"(uint64_t){low} | (uint64_t){high} << 32")
    return _set(to, _value(source, kind))


def _sum(parts: list[str], arguments: list[str]) -> str | None:
    kind, sign = parts[-1], _SIGNS[parts[0]]
    left, right = (_value(argument, kind) for argument in arguments[1:3])
    if kind == "f32":
        return _set(arguments[0], f"{left} {sign} {right}") if set(parts[1:]) <= {"rn", "f32"} else None
    if parts[0] in ("div", "rem"):
        return _set(arguments[0], f"{left} {sign} {right}")
    return _set(arguments[0], _wrapping(kind, left, sign, right))


def _product(parts: list[str], arguments: list[str]) -> str | None:
    kind = parts[-1]
    if kind == "f32":
        return _sum(parts, arguments)
    left, right = (_value(argument, kind) for argument in arguments[1:3])
    bits, full = int(kind[1:]), "int64_t" if kind[0] == "s" else "uint64_t"
    result = kind
    if parts[1] == "lo":
        product = _wrapping(kind, left, "*", right)
    elif parts[1] == "wide" and bits < 64:
        result = f"{kind[0]}{2 * bits}"
        product = f"({_TYPES[result]})(({full}){left} * ({full}){right})"
    elif parts[1] == "hi" and bits == 32:
        product = f"({_TYPES[kind]})((({full}){left} * ({full}){right}) >> 32)"
    else:
        return None
    if parts[0] == "mad":
        product = _wrapping(result, product, "+", _value(arguments[3], result))
    return _set(arguments[0], product)


def _fused(parts: list[str], arguments: list[str]) -> str | None:
    numbers = ", ".join(_value(argument, "f32") for argument in arguments[1:])
    return _set(arguments[0], f"__builtin_fmaf({numbers})") if parts[1:] == ["rn", "f32"] else None


def _bits(parts: list[str], arguments: list[str]) -> str:
    left, right = (_value(argument, parts[-1]) for argument in arguments[1:3])
    return _set(arguments[0], f"({_TYPES[parts[-1]]})({left} {_SIGNS[parts[0]]} {right})")


def _shift(parts: list[str], arguments: list[str]) -> str:
    """Shifts by the width or more give zeros, or the sign."""
    kind, c = parts[-1], _TYPES[parts[-1]]
    value, amount, bits = _value(arguments[1], kind), _value(arguments[2], "u32"), int(kind[1:])
    over = f"({c})({value} >> {bits - 1})" if parts[0] == "shr" and kind[0] == "s" else f"({c})0"
    sign = "<<" if parts[0] == "shl" else ">>"
    return _set(arguments[0], f"{amount} >= {bits} ? {over} : ({c})({value} {sign} {amount})")


def _unary(parts: list[str], arguments: list[str]) -> str | None:
    kind, value = parts[-1], _value(arguments[1], parts[-1])
    if parts[0] == "not":
        return _set(arguments[0], f"!{value}" if kind == "pred" else f"({_TYPES[kind]})~{value}")
    if parts[0] == "neg":
        zero = "" if kind == "f32" else _wrapping(kind, f"({_TYPES[kind]})0", "-", value)
        return _set(arguments[0], zero or f"-{value}")
    if parts[0] == "popc":
        return _set(arguments[0], f"(uint32_t)__builtin_popcount({value})")
    known = {
        ("abs", "f32"): "__builtin_fabsf",
        ("sqrt", "rn", "f32"): "__builtin_sqrtf",
        ("ex2", "approx", "ftz", "f32"): "ex2",
    }
    function = known.get(tuple(parts))
    return _set(arguments[0], f"{function}({value})") if function else None


def _extreme(parts: list[str], arguments: list[str]) -> str:
    numbers = ", ".join(_value(argument, parts[-1]) for argument in arguments[1:])
    return _set(arguments[0], f"{f'__builtin_f{parts[0]}f' if parts[-1] == 'f32' else f'std::{parts[0]}'}({numbers})")


def _convert(parts: list[str], arguments: list[str]) -> str | None:
    special = {
        "rna.tf32.f32": ("rna_tf32", "f32"),
        "rn.tf32.f32": ("rn_tf32", "f32"),
        "f32.f16": ("half_to_float", "u16"),
        "rn.f32.s32": ("(float)", "s32"),
        "rzi.s32.f32": ("(int32_t)", "f32"),
    }
    if found := special.get(".".join(parts[1:])):
        return _set(arguments[0], f"{found[0]}({_value(arguments[1], found[1])})")
    to, source = parts[1:] if len(parts) == 3 else ("", "")
    if to[:1] not in ("u", "s") or source[:1] not in ("u", "s"):
        return None
    return _set(arguments[0], f"({_TYPES[to]}){_value(arguments[1], source)}")


def _shuffle(parts: list[str], arguments: list[str]) -> str:
    result, _, predicate = arguments[0].partition("|")
    words = ", ".join(_value(argument, "b32") for argument in arguments[1:5])
    second = _set(predicate, "found.valid") if predicate else ""
    return f"{{ const auto found = shuffle_{parts[2]}({words}); {_set(result, 'found.word')} {second} }}"


def _matrix(parts: list[str], arguments: list[str]) -> str | None:
    if ".".join(parts) != _MMA:
        return None
    d, a, b, c = map(_vector, arguments)
    words = ", ".join(_value(register, "b32") for register in (*a, *b))
    addends = ", ".join(_value(register, "f32") for register in c)
    puts = " ".join(_set(register, f"out[{at}]") for at, register in enumerate(d))
    inputs = f"const unsigned in[6] = {{{words}}}; const float old[4] = {{{addends}}}; float out[4];"
    return f"{{ {inputs} mma_m16n8k8(in, old, out); {puts} }}"


def _barrier(parts: list[str], arguments: list[str]) -> str:
    return "host::warp_barrier();" if parts[1] == "warp" else "host::block_barrier();"


_RULES: dict[str, Callable[[list[str], list[str]], str | None]] = {
    "ret": lambda parts, arguments: "return;",
    "bra": lambda parts, arguments: f"goto {arguments[0].lstrip('$')};",
    "bar": _barrier,
    "membar": lambda parts, arguments: ";",  # blocks run one after the other
    "fence": lambda parts, arguments: ";",
    "nanosleep": lambda parts, arguments: ";",
    "cvta": lambda parts, arguments: _set(arguments[0], _value(arguments[1], parts[-1])),
    "setp": lambda parts, arguments: _set(
        arguments[0],
        f"{_value(arguments[1], parts[-1])} {_COMPARISONS[parts[1]]} {_value(arguments[2], parts[-1])}",
    ),
    "selp": lambda parts, arguments: _set(
        arguments[0],
        f"{_register(arguments[3])} ? {_value(arguments[1], parts[-1])} : {_value(arguments[2], parts[-1])}",
    ),
    **dict.fromkeys(("ld", "st"), _memory),
    **dict.fromkeys(("atom", "red"), _atomic),
    "mov": _move,
    **dict.fromkeys(("add", "sub", "div", "rem"), _sum),
    **dict.fromkeys(("mul", "mad"), _product),
    "fma": _fused,
    **dict.fromkeys(("and", "or", "xor"), _bits),
    **dict.fromkeys(("shl", "shr"), _shift),
    **dict.fromkeys(("not", "neg", "abs", "sqrt", "ex2", "popc"), _unary),
    **dict.fromkeys(("min", "max"), _extreme),
    "cvt": _convert,
    "shfl": _shuffle,
    "mma": _matrix,
}


@dataclass(frozen=True)
class Program:
    """A kernel of a PTX file, compiled.

    Args:
        library: that holds it alone.
        opcodes: of every basic block, in the order of the library's counters.
    """

    library: ctypes.CDLL
    opcodes: list[list[str]]

    def counted(self) -> Counter[str]:
        """Instructions executed since the last call, a warp's counted once."""
        counts = (ctypes.c_uint64 * len(self.opcodes)).in_dll(self.library, "counts")
        total: Counter[str] = Counter()
        for opcodes, threads in zip(self.opcodes, counts, strict=True):
            for opcode in opcodes:
                total[opcode] += threads
        ctypes.memset(counts, 0, ctypes.sizeof(counts))
        return Counter({opcode: threads // 32 for opcode, threads in total.items() if threads})


def build(text: str, name: str) -> Program:
    """Compile one kernel of a PTX file, once on a machine."""
    (kernel,) = translate(text, name)
    folder = emulation.folder()
    key = emulation.key(kernel.code.encode(), (emulation.HERE / "ptx_runtime.hpp").read_bytes(), repr(FLAGS).encode())
    target = folder / f"ptx-{name}-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            code = Path(scratch, "kernel.inc")
            code.write_text(
                f'static const char NAME[] = "{name}";\n'
                f"static void kernel(const void* parameters) {{\n{kernel.code}\n}}\n"
            )
            emulation.compile_to(target, *FLAGS, f'-DPTX="{code}"', f"-DBLOCKS={len(kernel.opcodes)}")
    return Program(emulation.load(target), kernel.opcodes)


@cache
def program(name: str, architecture: int = ARCHITECTURE) -> Program:
    """One kernel as it is in the sources."""
    return build(ptx(architecture), name)


class Ptx(emulation.Emulator):
    """The emulator, running what NVRTC made.

    Args:
        rough: the largest relative error of ex2.approx in units of 2^-22, which the PTX ISA allows to be 1; above 0
            the matrix unit's sums also round towards zero, as hardware's do.
        architecture: whose PTX.
        options: of the emulator.
    """

    def __init__(self, rough: float = 0.0, architecture: int = ARCHITECTURE, **options: int) -> None:
        super().__init__(**options)
        self.rough, self.architecture = rough, architecture

    def library(self, name: str) -> ctypes.CDLL:
        found = program(name, self.architecture).library
        ctypes.c_double.in_dll(found, "rough").value = self.rough
        return found
