"""Kernels as machine code: compiled by Numba once on a machine, then loaded from disk without it.

Numba's own cache fails where ours must not: a truncated or damaged file is loaded and run, a read-only home is an
import error, a function keeps its old code when one that it inlines has changed, and starting Numba costs a second.
Here a file's name is a digest of everything that the machine code depends on and the file begins with a digest of the
rest (disk.py), so what is loaded is what was written, by this very source; and whatever goes wrong, the kernel is
compiled in memory instead.
"""

import ctypes
import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite.binding as llvm

from nadam.core import element, gradient, rule, scalars
from nadam.core.exclusive import loading
from nadam.kernels.cpu import disk

HANDLERS = "xla.handler"
_SYMBOL_END = b"\n"
# What C calls: a function of XLA's interface, which hands on where to put an error and how threads may call it back.
_HANDLER = """
declare i32 @"{symbol}"(i8*, i8*, i64, i64)

define i64 @handler(i64 %frame) {{
    %unused = alloca [64 x i8]
    %nowhere = bitcast [64 x i8]* %unused to i8*
    %called = call i32 @"{symbol}"(i8* %nowhere, i8* %nowhere, i64 %frame, i64 ptrtoint (void (i64)* @task to i64))
    ret i64 0
}}

define void @task(i64 %scratch) {{
    %unused = alloca [64 x i8]
    %nowhere = bitcast [64 x i8]* %unused to i8*
    %called = call i32 @"{symbol}"(i8* %nowhere, i8* %nowhere, i64 %scratch, i64 0)
    ret void
}}
"""
# What LLVM makes of loops that fill or copy; without Numba in the process it would find none of these.
_LIBRARY = {"memset": ctypes.memset, "memcpy": ctypes.memmove, "memmove": ctypes.memmove}
_FUNCTIONS = ("pow", "log", "expm1")  # of the C library that Python's own `math` calls
_kernels: dict[tuple[Any, ...], Any] = {}
_engines: list[Any] = []  # own the machine code, which must outlive every thread that runs it
compilations = 0  # kernels that this process compiled, for those who want to know


class Kernel(partial[None]):
    """A kernel as a function of two int64: the address of its arguments, and how much it may do in this call."""

    address: int  # of its machine code, for others that call it


def kernel(module: str, name: str, *variant: Any) -> Kernel:
    """A kernel, which releases the GIL."""
    known = _kernels.get((module, name, variant))
    return known if known is not None else _make(_callable, module, name, variant)  # type: ignore[no-any-return]


def kernel_holding_gil(module: str, name: str, *variant: Any) -> Kernel:
    """A kernel that keeps the GIL, and raises the Python exception that it leaves, if any."""
    key = (module, name, variant)
    return _kernels[key] if key in _kernels else _make(_callable_holding_gil, *key)  # type: ignore[no-any-return]


def handler(name: str, *variant: Any) -> int:
    """The address of a C function: a handler of XLA's foreign function interface, from xla/handler.py."""
    known = _kernels.get((HANDLERS, name, variant))
    return known if known is not None else _make(_handler, HANDLERS, name, variant)  # type: ignore[no-any-return]


def _make(load: Callable[[str, bytes], Any], module: str, name: str, variant: tuple[Any, ...]) -> Any:
    with loading():
        if (module, name, variant) in _kernels:  # by another thread meanwhile
            return _kernels[module, name, variant]
        path = _path(f"{module}-{name}" + "".join(f"-{part}" for part in variant))
        content = None if path is None else disk.read(path)
        if content is None:
            content = _compile(module, name, variant)
            if path is not None:
                disk.write(path, content)
        symbol, machine_code = content.split(_SYMBOL_END, 1)
        made = _kernels[module, name, variant] = load(symbol.decode(), machine_code)
        return made


def _compile(module: str, name: str, variant: tuple[Any, ...]) -> bytes:
    """Machine code: the name of its function and an object file."""
    global compilations
    from numba import config, int64, types, void

    if config.DISABLE_JIT:
        raise RuntimeError("NUMBA_DISABLE_JIT is set, and there is no compiled kernel on disk: unset it once")
    compilations += 1
    function = getattr(
        importlib.import_module(f"nadam.kernels.{module if module == HANDLERS else 'cpu.' + module}"), name
    )(*variant)
    # Python never calls it, and where one symbol is missing (Numba's, in a process without it) LLVM resolves none.
    function.targetoptions |= {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    signature = void(int64, int64)
    function.compile(signature)
    compiled = function.overloads[signature.args]
    assert compiled.signature.return_type == types.none
    _, _, (machine_code, _) = compiled.library.serialize_using_object_code()
    symbol: str = compiled.fndesc.llvm_func_name
    return symbol.encode() + _SYMBOL_END + bytes(machine_code)


def _callable(symbol: str, machine_code: bytes, convention: Any = ctypes.CFUNCTYPE) -> Kernel:
    # Numba's calling convention: where to put the result, where to put an exception, then the arguments, two int64:
    # as pointers, which they are as wide as, they are converted in half the time.
    kind = convention(ctypes.c_int32, *[ctypes.c_void_p] * 4)
    address = _engine(machine_code).get_function_address(symbol)
    nowhere = ctypes.cast(ctypes.create_string_buffer(64), ctypes.c_void_p)
    made = Kernel(kind(address), nowhere, nowhere)
    made.address = address
    return made


_callable_holding_gil = partial(_callable, convention=ctypes.PYFUNCTYPE)


def _handler(symbol: str, machine_code: bytes) -> int:
    return int(_engine(machine_code, _HANDLER.format(symbol=symbol)).get_function_address("handler"))


def function_of(assembly: str, name: str) -> int:
    """The address of a function of some LLVM assembly."""
    return int(_engine(None, assembly).get_function_address(name))


def _engine(machine_code: bytes | None, assembly: str = "") -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    for name, function in {**_LIBRARY, **mathematical_functions()}.items():
        llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="large")  # a call may go far
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(assembly), machine)
    if machine_code is not None:
        engine.add_object_file(llvm.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    _engines.append(engine)
    return engine


@cache
def mathematical_functions() -> dict[str, Any]:
    """Those of the C library that Python's own `math` calls; empty where they cannot be found."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
        return {name: getattr(library, name) for name in _FUNCTIONS}
    return {}


def _path(name: str) -> Path | None:
    """Where the machine code of a kernel is kept; None where there is no place that only this user can write to."""
    folder = disk.folder()
    with suppress(Exception):
        if folder is not None:
            key = f"{name} {_environment()} {_mathematics()}"
            return folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.kernel"
    return None


@cache
def _environment() -> str:
    """What machine code depends on besides the kernel's name and the mathematics."""
    package, sources = Path(__file__).parents[2], hashlib.sha256()
    files = sorted(file for room in ("core", "kernels") for file in (package / room).rglob("*.py"))
    if not files:
        raise FileNotFoundError("no sources to tell one version from another by")
    for source in files:
        sources.update(source.name.encode() + b"\0" + source.read_bytes())
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    processor = llvm.get_host_cpu_name() + llvm.get_host_cpu_features().flatten()
    versions = (sys.implementation.cache_tag, version("numba"), version("llvmlite"))
    return f"{versions} {settings} {llvm.get_process_triple()} {processor} {sources.hexdigest()}"


def _mathematics() -> str:
    """The functions that are compiled into the passes, as they are now."""
    modules = (rule, element, scalars, gradient)
    functions = (value for module in modules for value in vars(module).values() if isinstance(value, FunctionType))
    codes, constants = [function.__code__ for function in functions], [scalars.MOMENTUM_WARMUP]
    return repr([*constants, *((code.co_code, code.co_consts, code.co_names) for code in codes)])
