"""README and the documentation: the programs run and print what stands below them, the commands are there.

The programs of a page run in order, in one process for each backend of Keras that a fence's title names
(`title="KERAS_BACKEND=jax"`). Those that cannot run everywhere are marked `{ .no-run }` and only compiled.
"""

import ast
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from shutil import which
from textwrap import dedent

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in ROOT.glob("docs/**/*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```(?:\s*^\1```text\n(.*?)^\1```)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan)(?!\w)")
# Needs processes, or a GPU.
NOT_RUN = {"docs/scaling.md": 1, "docs/gpu.md": 2}

# Runs programs in one namespace, each with what it printed; ends at one that needs a package that is not installed.
DRIVER = """
import contextlib, io, json, sys
from importlib.util import find_spec
names, printed, programs = {"__name__": "__main__"}, [], json.load(sys.stdin)
if any("import timm" in program for program in programs) and find_spec("timm"):
    from training import timm_optim  # without torchvision
    timm_optim()
try:
    for program in programs:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(program, "program " + str(len(printed) + 1), "exec"), names)
        printed.append(out.getvalue())
except ImportError as error:
    cause = error.__cause__ or error
    if not isinstance(cause, ModuleNotFoundError) or cause.name.startswith("nadam"):
        raise
    printed = cause.name
json.dump(printed, sys.__stdout__)
"""


def programs(text):
    """Backend -> the programs of a page that run in one process, each with the output that is shown below it."""
    found = {}
    for indent, language, options, body, shown in FENCE.findall(text):
        if language == "python" and ".no-run" not in options:
            backend = re.search(r'title="KERAS_BACKEND=(\w+)"', options)
            body, shown = dedent(body), dedent(shown.replace("\n" + indent, "\n"))
            found.setdefault(backend[1] if backend else "torch", []).append((body, shown.strip()))
    return found


def run(sources, folder, backend="torch"):
    """What each of some programs prints; or the name of a package that is missing."""
    paths = [str(ROOT / "src"), str(ROOT / "tests" / "torch"), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = {"KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(paths), "TF_CPP_MIN_LOG_LEVEL": "2"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **given},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(printed, shown):
    """A program's output: losses fall, and it is what is shown, numbers within what libraries round differently."""
    losses = [float(loss) for loss in re.findall(r"^loss (\S+)$", printed, re.MULTILINE)]
    assert all(after < before for before, after in pairwise(losses)), losses
    assert len(losses) != 1
    if shown:
        assert NUMBER.sub("#", printed.strip()) == NUMBER.sub("#", shown)
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, nan_ok=True)


@pytest.mark.parametrize(
    ("page", "backend"), [(page, backend) for page, text in PAGES.items() for backend in programs(text)]
)
def test_the_programs_run(page, backend, tmp_path):
    given = programs(PAGES[page])[backend]
    printed = run([source for source, _ in given], tmp_path, backend)
    if isinstance(printed, str):
        pytest.skip(f"{printed} is not installed")
    for (source, shown), text in zip(given, printed, strict=True):
        try:
            check(text, shown)
        except AssertionError as error:
            raise AssertionError(f"{source}\nprinted\n{text}") from error


def test_few_programs_are_not_run():
    marked = {page: re.findall(r"```python \{ \.no-run \}\n(.*?)```", text, re.DOTALL) for page, text in PAGES.items()}
    assert {page: len(sources) for page, sources in marked.items() if sources} == NOT_RUN
    for page, sources in marked.items():
        for source in sources:
            compile(dedent(source), page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_name_what_there_is(page):
    text = PAGES[page]
    shell = [body for _, language, _, body, _ in FENCE.findall(text) if language == "sh"]
    lines = re.findall(r"^    (\S.*)$", FENCE.sub("", text), re.MULTILINE)
    inline = re.findall(r"`((?:make|python|torchrun) [^`\n]+)`", text)
    targets = re.findall(r"^([a-z-]+)(?: [a-z-]+)*:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in [*"\n".join(shell).splitlines(), *lines, *inline]:
        if made := re.match(r"make ([a-z-]+)", line):
            assert made[1] in targets, line
        for module in re.findall(r"python -m ([\w.]+)", line):
            assert find_spec(module) or (ROOT / f"{module.replace('.', '/')}.py").exists(), line
        for file in re.findall(r"(?:python|torchrun) .*?((?:examples|benchmarks)/\w+\.py)", line):
            assert (ROOT / file).exists(), line


def test_a_page_that_is_wrong_is_seen(tmp_path):
    shown = "    ```python\n    print('x is', x)\n    ```\n\n    ```text\n    x is 2\n    ```"  # in a tab
    page = "```python\nx = 1\n```\n\n" + shown
    assert programs(page) == {"torch": [("x = 1\n", ""), ("print('x is', x)\n", "x is 2")]}
    printed = run([source for source, _ in programs(page)["torch"]], tmp_path)
    assert printed == ["", "x is 1\n"]
    for text, shown in (("x is 1", "x is 2"), ("x is 1", "y is 1"), ("x is 1", "x is nan"), ("loss 1\nloss 2", "")):
        with pytest.raises(AssertionError):
            check(text, shown)
    check("x is 1.0001", "x is 1")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(["1 / 0"], tmp_path)
    assert run(["import bogus_package"], tmp_path) == "bogus_package"


# Each page in a frame as wide as a telephone; how wide its content is, in the title of the page around.
FRAMES = """<title></title><script>
for (const page of PAGES) {
  const frame = document.createElement("iframe");
  frame.style.width = "390px"; frame.style.height = "800px"; frame.src = page;
  frame.onload = () => { document.title += page + " " + frame.contentDocument.documentElement.scrollWidth + ";"; };
  document.documentElement.appendChild(frame);
}
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built."""
    for package in ("mkdocs", "material", "mkdocstrings", "ziamath"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("documentation") / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "--site-dir", str(folder)]
    subprocess.run(build, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/api/")])
def test_every_public_name_is_in_the_reference(site, page):
    module = re.search(r"^::: (\S+)$", PAGES[page], re.MULTILINE)[1]
    path = ROOT / "src" / module.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    listed = re.search(r"^__all__ = (\[.*?\])", source, re.DOTALL | re.MULTILINE)
    defined = re.findall(r"^(?:class|def) ([A-Za-z]\w*)", source, re.MULTILINE)
    names = set(ast.literal_eval(listed[1]) if listed else defined)
    built = (site / page.removeprefix("docs/")).with_suffix(".html").read_text()
    shown = re.findall(r"doc-object-name[^>]*>(\w+)<", built)
    assert names - {"checkpoint", "schedules"} <= set(shown)  # which have pages of their own


def test_no_page_is_wider_than_a_telephone_or_loads_from_elsewhere(site):
    chromium = which("chromium") or which("chromium-browser") or pytest.skip("chromium is not installed")
    (site / "wide.html").write_text("<!doctype html><div style='width: 500px'>wide</div>")
    pages = sorted(page.relative_to(site).as_posix() for page in site.rglob("*.html") if page.name != "404.html")
    (site / "frames.html").write_text(FRAMES.replace("PAGES", json.dumps(pages)))
    options = ["--headless", "--no-sandbox", "--allow-file-access-from-files", "--virtual-time-budget=60000"]
    command = [chromium, *options, "--dump-dom", (site / "frames.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    widths = dict(re.findall(r"(\S+\.html) (\d+);", re.search(r"<title>(.*?)</title>", dom)[1]))
    assert widths.keys() == set(pages)
    assert [page for page in pages if int(widths[page]) > 390] == ["wide.html"]
    for page in pages:
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]* src="https?:|<link[^>]* href="https?:', (site / page).read_text()
        )
        assert not loaded, page
