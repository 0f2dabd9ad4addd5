"""`nadam bench` and `nadam info`: every part runs once, small, and the report is a page; no test looks at a time."""

import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest

from nadam import cli
from nadam.bench import machine, measure_all, page, records
from nadam.bench.loops import MLP
from nadam.bench.options import HOSTS
from nadam.bench.records import Growth, Kept, Run, Target, Timing

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NUMBERS = ["host", "model", "kind", "against", "ours", "theirs", "ratio"]


def canned():
    run = Run({"processor": "<One> & Two", "CPUs": "2, all", "load at the start": "0.1"}, {"nadam": "1"}, {"rounds": 3})
    times = [("NAdam", 0.004, 4.0), ("fused Adam", 0.0008, 0.8), ("floor", 0.0009, 0.9)]
    run.rows["loops"] = [Timing("PyTorch", "MLP", "plain", who, 0.001, s, r, wanted=1.0) for who, s, r in times]
    sizes = [10**n for n in range(3, 9)]
    run.rows["growth"] = [Growth("PyTorch", "parameters", n, who, n * 1e-9) for n in sizes for who in ("ours", "floor")]
    run.rows["kept"] = [Kept("PyTorch", "float32", "plain", "ours", 8.0)]
    run.rows["targets"] = [Target("memory", "< 1", "0.5", True)]
    return run


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(canned().to_json())
    assert records.read(path) == canned()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "rows": 3}'])
def test_a_wrong_file_is_one_clear_line(text, tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--compare", str(path)])
    assert str(path) in capsys.readouterr().err.splitlines()[-1]


def test_runs_are_compared_row_by_row():
    now, then = canned(), canned()
    then.rows["loops"] = [replace(row, ratio=2.0) for row in then.rows["loops"][:2]]
    assert [change.factor for change in records.compare(now, then)] == [2.0, 0.4]


def test_ahead_level_behind_and_bounds():
    row = canned().rows["loops"][0]
    assert [replace(row, ratio=r).verdict for r in (1.2, 1.01, 0.99, 0.8)] == ["ahead", "level", "level", "behind"]
    assert replace(row, against="floor").verdict == "bound"


def test_the_page_asks_for_nothing_and_escapes_what_it_shows():
    text = page.render(canned(), records.compare(canned(), canned()))
    assert "&lt;One&gt; &amp; Two" in text
    assert "<script" not in text
    assert not re.search(r"(src|href)=|url\(|@import|https?:", text)
    assert "$" not in text
    assert 'class="behind" title="">0.80x' in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(width, tmp_path):
    image = pytest.importorskip("PIL.Image")
    inside = tmp_path / "report.html"
    inside.write_text(page.render(canned(), records.compare(canned(), canned())))
    # In a frame of that width, since a window has a least one; what does not fit would make its title "wide".
    script = f"onload=()=>{{document.title=frames[0].document.documentElement.scrollWidth<={width}?'fits':'wide'}}"
    (tmp_path / "frame.html").write_text(
        f'<script>{script}</script><body style="margin:0"><iframe src="report.html" width="{width}" height="1800" '
        'style="border:0"></iframe>'
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500)},1800"]
    url = (tmp_path / "frame.html").as_uri()
    dom = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120).stdout
    assert "<title>fits</title>" in dom
    subprocess.run([*command, f"--screenshot={tmp_path / 'page.png'}", url], capture_output=True, timeout=120)
    with image.open(tmp_path / "page.png") as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colours) > 20


def measured(host, part, *models):
    """The rows of a part, one round of it."""
    if host not in machine.installed_hosts():
        pytest.skip(f"no {host}")
    told = {"parts": [part], "models": list(models), "rounds": 1, "quick": True}
    run = measure_all.measure([host], told, lambda *_: None)
    assert not run.failed
    return run.rows[part]


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_trains_a_model_once(host):
    rows = measured(host, "loops", MLP)
    assert rows
    assert all(isinstance(row, Timing) and row.ours > 0 for row in rows)


@pytest.mark.parametrize("host", ["numpy", "torch"])
def test_what_is_kept_is_counted(host):
    rows = measured(host, "kept")
    assert {row.who for row in rows} > {"ours"}
    assert {row.bytes for row in rows if (row.dtype, row.kind, row.who) == ("float32", "plain", "ours")} == {8.0}
    codes, scales = 2 * 100_000, 2 * 49 * 64  # a byte for each of 32 in blocks of 2,048
    small = {row.bytes for row in rows if (row.dtype, row.kind) == ("float32", "state_bits=8")}
    assert small == {(codes + scales) / 100_000}


def test_a_process_that_ends_early_is_reported():
    told = {"parts": ["loops"], "models": [], "rounds": 0, "quick": True}  # of nothing there is no median
    run = measure_all.measure(["numpy"], told, lambda *_: None)
    assert "status 1" in run.failed["NumPy"]


def test_the_command_writes_tables_json_and_the_page(tmp_path, capsys):
    pytest.importorskip("rich")
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    assert cli.main(["bench", "--quick", "--host", "numpy", "--rounds", "1", *files]) == 0
    assert "In training loops" in capsys.readouterr().out
    assert "<h3>NumPy</h3>" in (tmp_path / "a.html").read_text()
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["format"] == records.FORMAT
    assert set(NUMBERS) <= found["rows"]["loops"][0].keys()
    assert {row["axis"] for row in found["rows"]["growth"]} == {"parameters", "tensors"}


def test_tables_fit_80_columns():
    console = pytest.importorskip("rich.console").Console(width=80, file=io.StringIO())
    run = canned()
    row = replace(run.rows["loops"][0], host="Keras on tensorflow", model="transformer, 0.8M", against="fused Adam")
    run.rows["loops"].append(row)
    terminal = importlib.import_module("nadam.bench.terminal")
    terminal.show(console, run, [])
    (line,) = (line for line in console.file.getvalue().splitlines() if "transformer, 0.8M" in line)
    assert " ".join(line.split()) == "transformer, 0.8M plain fused Adam 1.00 ms 4.00 ms 4.00x 1.00x yes"


def test_without_rich_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["bench", "--host", "numpy"]) == 1
    assert capsys.readouterr().err == 'nadam bench: needs rich: pip install "nadam[bench]"\n'


def test_info_tells_versions_and_imports_no_framework(capsys):
    code = "import sys; from nadam.cli import main; main(['info', '--json'])"
    code += "; assert not {'torch', 'jax', 'keras', 'rich'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    assert found["versions"]["numpy"] != "not installed"
    assert (found["versions"]["torch"] == "not installed") == (find_spec("torch") is None)
    assert found["cache"]["state"].startswith(("usable", "not used"))


@pytest.mark.parametrize("arguments", [["bench", "--rounds", "0"], ["bench", "--host", "abacus"], ["bogus"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "nadam" in capsys.readouterr().err
