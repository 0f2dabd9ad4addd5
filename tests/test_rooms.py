"""Which module imports which: downwards between the rooms, never in a circle; and how many a step of NAdam opens."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import nadam

ROOT = Path(nadam.__file__).parent
# Room -> what it may import besides itself.
BELOW = {
    "core": set(),
    "kernels": {"core"},
    "checkpoint": {"core"},
    "conformance": set(),
    "watch": {"core"},
    "numpy": {"core", "kernels"},
    "torch": {"core", "kernels"},
    "jax": {"core", "kernels"},
    "keras": {"core", "kernels", "torch", "jax"},
    "bench": {"core", "kernels", "checkpoint", "numpy", "torch", "jax", "keras", "watch"},
    "cli": {"core", "kernels", "checkpoint", "torch", "keras", "bench"},
    "__main__": {"cli"},
}
# What the machine code of a step is compiled from besides the modules that Python runs.
COMPILED = {"kernels/cpu/passes.py", "core/element.py", "core/rule.py"}
COMPILED_WHERE_SMALL = {"kernels/cpu/prepare.py", "core/scalars.py"}
MOST = 15


def name_of(path):
    parts = ("nadam", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imports(module, source):
    """The modules of the package that a module imports, wherever in it; of a package's names, their modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "") in MODULES:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in found)


def circle(sources):
    """A circle of imports; None where there is none."""
    graph = {module: set(imports(module, source)) - {module} for module, source in sources.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return None


SOURCES = {module: path.read_text() for module, path in MODULES.items()}


@pytest.mark.parametrize("module", [module for module in MODULES if module.count(".") > 0])
def test_imports_run_downwards(module):
    room = module.split(".")[1]
    above = {name for name in imports(module, SOURCES[module]) if name.split(".")[1] not in {room, *BELOW[room]}}
    assert not above


def test_no_modules_import_each_other_in_a_circle():
    # The package's own __init__ and those of the hosts are doors to what is inside.
    inside = {module: source for module, source in SOURCES.items() if MODULES[module].name != "__init__.py"}
    assert circle(inside) is None


def test_a_circle_is_seen():
    wrong = {**SOURCES, "nadam.core.rule": "def late():\n    from nadam.core.element import element"}
    assert set(circle(wrong)) >= {"nadam.core.rule", "nadam.core.element"}


# What a docstring must not begin with, since it sends its reader elsewhere.
LIKE_ANOTHER = re.compile(r"(As (of )?`|The same[ .]|Likewise)")
LIKE_ITS_OWN = {"numpy/loss_scale.py"}  # whose methods are those of the optimizer that it wraps
PUBLIC = {"apply_gradients", "state_dict", "as_optax"}  # for users, who know the other; and they go on after it


def empty_docstrings(source, like_its_own=False):
    """The functions and classes, of those that are not for users, whose docstring does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name not in PUBLIC:
            text = ast.get_docstring(node) or ""
            if LIKE_ANOTHER.match(text) and not (like_its_own and text.startswith("As `Nadam.")):
                yield node.name


@pytest.mark.parametrize("module", MODULES)
def test_a_docstring_says_something_itself(module):
    file = MODULES[module].relative_to(ROOT).as_posix()
    assert not list(empty_docstrings(SOURCES[module], file in LIKE_ITS_OWN))


@pytest.mark.parametrize("text", ["As `other`.", "As of `Flags`.", "The same.", "The same for rows.", "Likewise."])
def test_a_docstring_that_says_nothing_is_seen(text):
    source = f'def f():\n    """{text}"""'
    assert list(empty_docstrings(source)) == ["f"]
    assert not list(empty_docstrings(source.replace(text, f"The sum of all. {text}")))


@pytest.mark.parametrize("large", [False, True])
def test_a_step_of_nadam_opens_few_files(large):
    torch = pytest.importorskip("torch")
    from nadam.torch import NAdam

    params = [torch.nn.Parameter(torch.randn(1200 if large else 30, 1000)) for _ in range(4)]
    optimizer, opened = NAdam(params), COMPILED | (set() if large else COMPILED_WHERE_SMALL)
    for param in params:
        param.grad = torch.randn_like(param)
    for _ in range(3):
        optimizer.step()

    def profile(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT):
            opened.add(str(file.relative_to(ROOT)))

    sys.setprofile(profile)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    assert len(opened) <= MOST, sorted(opened)
    # And the README's map names them.
    readme = (ROOT.parent.parent / "README.md").read_text()
    assert set(re.findall(r"`((?:core|kernels|torch)/[\w/]+\.py)`", readme)) >= opened
