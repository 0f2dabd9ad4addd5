"""A function of the core in the words that Triton has.

Triton reads a function's source, and of Python's language it knows a part: no ``**``, no arguments by keyword only, no
calls of other functions than its own. So the source is spelled anew, from the function itself at import, and each
global name stands for what the caller says. The mathematics is still written once.
"""

import ast
import inspect
import linecache
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


class _Speller(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        arguments = node.args
        arguments.args += arguments.kwonlyargs
        arguments.kwonlyargs, arguments.kw_defaults = [], []
        for argument in arguments.args:
            argument.annotation = None
        node.returns, node.decorator_list = None, []
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Pow):
            return node
        return ast.Call(ast.Name("power", ast.Load()), [node.left, node.right], [])


def spelled(function: Callable[..., Any]) -> str:
    """The source of a function as Triton can read it.

    Example:
        >>> from nadam.core.scalars import momentum
        >>> print(spelled(momentum))
        def momentum(beta1, momentum_decay, step):
            return beta1 * (1.0 - 0.5 * power(MOMENTUM_WARMUP, step * momentum_decay))
    """
    tree = _Speller().visit(ast.parse(inspect.getsource(function)))
    return ast.unparse(ast.fix_missing_locations(tree))


def compiled(function: Callable[..., Any], **names: Any) -> Any:
    """A function of the core, compiled by Triton."""
    return jitted(spelled(function), f"{function.__module__}.{function.__qualname__}", names)


def jitted(source: str, label: str, names: dict[str, Any]) -> Any:
    """The function that a source defines, compiled by Triton."""
    # Triton asks `inspect` for the source, which asks `linecache`; an entry without a date is never looked up on disk.
    file = f"<{label} for Triton>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names["tl"] = tl  # its interpreter looks for it among a function's global names
    names["__name__"] = __name__
    known = set(names)
    exec(compile(source, file, "exec"), names)
    (name,) = set(names) - known - {"__builtins__"}
    return triton.jit(names.pop(name))
