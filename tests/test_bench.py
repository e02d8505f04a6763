"""`python -m reparam_fused bench`, the pages that are made of it, and the comparison of commits."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ON_STAND_IN
from helpers import needs_kernels, patience

from reparam_fused import bench, reference
from reparam_fused.__main__ import main
from reparam_fused.bench import accuracy, cases, lines, rows, table, timer

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
pytestmark = needs_kernels


def script(name: str) -> ModuleType:
    """A file of benchmarks/, which finds the others of that folder."""
    if str(ROOT / "benchmarks") not in sys.path:
        sys.path.append(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(name: str = "2^10") -> cases.Case:
    return next(c for c in cases.cases() if c.group == "sizes" and c.name == name)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[cases.Case]:
    """A sample, a head, a call and a step: without what takes seconds to compile or to run."""
    names = ("sizes: 2^10, float32", "calls: one shape", "workloads: SAC")
    chosen = [c for c in cases.cases() if str(c).startswith(names)]
    monkeypatch.setattr(cases, "cases", lambda: chosen)
    monkeypatch.setattr(lines, "compiled", lambda line, *_: line)
    monkeypatch.setattr(cases, "compiled", lambda line, *_: line)
    monkeypatch.setattr(accuracy, "compiled", lambda line, *_: line)
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    if ON_STAND_IN:  # it has none of the kernels of torch.func._random

        def missing(*_: object) -> None:
            raise NotImplementedError

        monkeypatch.setattr(cases, "keyed_random", missing)
        monkeypatch.setattr(accuracy, "keyed_random", missing)
    return chosen


def test_a_run_writes_what_it_is_asked_for(
    few: list[cases.Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"rows.{name}" for name in ("json", "csv", "png")}
    options = [f"--json={files['json']}", f"--csv={files['csv']}", f"--plot={files['png']}"]
    assert main(["bench", "--device", "cpu", *options]) == 0
    shown = capsys.readouterr().out
    facts, found = rows.read_json(files["json"])
    assert facts["torch"] == torch.__version__
    assert {str(c).split(",")[0] for c in few} <= {
        f"{r.group}: {r.case}".split(",")[0] for r in found
    }
    for row in found:
        assert 0 < row.seconds_low <= row.seconds <= row.seconds_high
        assert row.rounds >= 3
    for line in table.by_case(found):
        assert line["fused"].ratio == 1
        assert line["eager"].seconds > 0
    sized = [row for row in found if row.group == "sizes"]
    assert {row.call for row in sized} >= {"fused", "eager", "floor"}
    assert {row.error.split(",")[0] for row in sized if row.call == "fused"} == {"same bits"}
    with files["csv"].open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(found)
    assert {row["torch"] for row in read} == {torch.__version__}
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "same bits" in shown
    assert "SAC" in shown


def test_quick_has_less(few: list[cases.Case], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", "--quick", "--group", "calls"]) == 0
    shown = capsys.readouterr().out
    assert "one shape" in shown
    assert "2^10" not in shown


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "rich" else find(name)
    )
    with pytest.raises(SystemExit, match="bench needs rich: pip install rich"):
        main(["bench", "--quick"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick", "--group=views"], "--quick has no case of views"),
        (["--group=calls", "--plot=p.png"], "--plot draws the cases of --group sizes"),
        (["--quick", "--csv=no/such/folder/x.csv"], "cannot write no/such/folder/x.csv"),
    ],
)
def test_what_would_show_nothing_is_said(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["bench", "--device", "cpu", *options])


def test_a_run_that_is_stopped_leaves_the_rows_there_were(
    few: list[cases.Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is opened when there is something to write: in a checkout one that was emptied
    before would make the commit a changed one, too."""

    def stop(*_: object) -> None:
        assert path.read_text() == "rows"
        raise KeyboardInterrupt

    path = tmp_path / "rows.json"
    path.write_text("rows")
    monkeypatch.setattr(rows, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "--device", "cpu", f"--json={path}"])
    assert path.read_text() == "rows"


def test_a_case_runs_on_each_device(device: torch.device, few: list[cases.Case]) -> None:
    """On a GPU once with a cold and once with a warm cache; of the host's time, once."""
    sample, call = few[-2], next(c for c in few if c.group == "calls")
    assert sample.group == "sizes"
    caches = [""] if device.type == "cpu" else ["cold", "warm"]
    found = rows.measure(sample, device, 0.0)
    assert [row.cache for row in found if row.call == "fused"] == caches
    assert {row.device for row in found} == {str(device)}
    found = rows.measure(call, device, 0.0)
    assert [(row.cache, row.threads) for row in found if row.call == "fused"] == [("", 1)]


class Clock:
    """The timer's, which no other work on the machine moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timer, "time", clock)
    return clock


def test_ratios_are_of_one_round(clock: Clock) -> None:
    """A machine that becomes slower while it runs changes no ratio."""
    slow = [1.0]

    def call(seconds: float) -> timer.Call:
        return lambda: clock.sleep(seconds * slow[0])

    turns = timer.Turns({"fused": call(1e-3), "eager": call(3e-3)}, CPU)
    for slow[0] in (1.0, 2.0, 5.0, 1.0, 3.0):
        for name in turns.calls:
            turns.take(name)
    found = {row.call: row for row in rows.rows_of(small(), CPU, turns, errors=False)}
    assert found["fused"].ratio == 1
    eager = found["eager"]
    assert [eager.ratio_low, eager.ratio, eager.ratio_high] == pytest.approx([3, 3, 3])
    assert eager.rounds == 5


def test_short_calls_are_timed_in_blocks(clock: Clock) -> None:
    count = [0]

    def call() -> None:
        count[0] += 1
        clock.sleep(1e-6)

    turns = timer.Turns({"fused": call}, CPU)
    assert turns.block == pytest.approx(timer.BLOCK / 1e-6, abs=1)
    before = count[0]
    assert turns.take("fused") == pytest.approx(1e-6)
    assert count[0] - before == turns.block


@pytest.mark.parametrize("name", lines.FORMS)
def test_sigma_is_one_where_a_form_says_so(name: str) -> None:
    """The noise of a rival is found by that."""
    form = lines.FORMS[name]
    unit = torch.tensor(form.unit, dtype=torch.float64)
    torch.testing.assert_close(form.sigma(unit), torch.ones_like(unit), rtol=1e-12, atol=0)
    exact = accuracy._SIGMAS[name](np.longdouble(form.unit))
    assert abs(float(exact) - 1) < 1e-12


def test_errors_are_in_ulp() -> None:
    wanted = np.asarray([1.0, 3.0, 1e-40], dtype=np.longdouble)
    actual = torch.tensor([1.0 + 2**-23, 3.0, 1e-40])
    assert accuracy.error(actual, wanted, wanted) == pytest.approx(1.0)
    actual = torch.tensor([1.0, 3.0 - 2**-21, 1e-40])
    assert accuracy.error(actual, wanted, wanted) == pytest.approx(2.0)


def test_wrong_bits_are_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    key, mu, scale = torch.zeros(2, dtype=torch.uint64), torch.zeros(8), torch.zeros(8)
    assert accuracy._bits_of_sample("log_var", mu, scale, key) == "same bits"
    right = reference.sample_from_key
    monkeypatch.setattr(
        reference, "sample_from_key", lambda *a: right(*a).nextafter(torch.tensor(9.0))
    )
    assert accuracy._bits_of_sample("log_var", mu, scale, key) == "OTHER BITS"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_case_moves_as_many_bytes_as_its_floor(dtype: torch.dtype) -> None:
    add = cases.floor(1200 * dtype.itemsize, dtype, CPU)()
    assert isinstance(add, torch.Tensor)
    assert 3 * add.nbytes == 1200 * dtype.itemsize


def test_every_way_of_a_call_gives_what_its_line_gives(device: torch.device) -> None:
    """Shapes, dtypes and, where nothing is drawn, values: the rivals do the same work."""
    if ON_STAND_IN:
        pytest.skip("the CPU shows it; the stand-in has not all that the lines of torch do")
    for name, head in lines.HEADS.items():
        given = lines.operands(*[(4, 6)] * head.operands, dtype=torch.float64, device=device)
        ours, theirs = (line(*given) for line in head.pair)
        for a, b in zip(
            *(x if isinstance(x, tuple) else (x,) for x in (ours, theirs)), strict=True
        ):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if name.startswith("KL"):
            torch.testing.assert_close(ours, theirs)
    for form in lines.FORMS.values():
        given = lines.operands((4, 6), (4, 6), dtype=torch.float64, device=device)
        for pair in (form.sample(), form.samples(3)):
            ours, theirs = (line(*given) for line in pair)
            assert isinstance(ours, torch.Tensor)
            assert isinstance(theirs, torch.Tensor)
            assert ours.shape == theirs.shape


# The pages


def test_the_pages_show_the_rows_that_there_are() -> None:
    """`make pages` writes them anew; a figure typed by hand, or rows without it, is found here."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "pages.py"), "--check"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_stale_page_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pages = script("pages")
    content: dict[str, Any] = json.loads(pages.RESULTS.read_text())
    for row in content["rows"]:
        row["ratio"] *= 1.5
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    monkeypatch.setattr(pages, "RESULTS", other)
    assert pages.stale() == [
        "README.md",
        "docs/performance.md",
        "benchmarks/README.md",
        "docs/figures/time-over-size.png",
    ]


def test_no_small_call_is_slower_than_its_line_without_a_reason() -> None:
    """At 128 x 20; and what is said to need a reason needs one."""
    pages = script("pages")
    _, found = rows.read_json(pages.RESULTS)
    ways = dict(pages.calls_table(found))
    assert {name for name, passes in ways.items() if pages.needs_reason(passes)} <= {
        name for name in ways if pages.reason(name)
    }


# Two commits


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "compare.py"), *arguments],
        capture_output=True, text=True, check=False, timeout=patience(300),
    )  # fmt: skip


CASE = "--case=calls: one shape, float32, forward"


def test_a_package_is_as_fast_as_itself() -> None:
    result = compare("installed", "installed", CASE, "--seconds=0.5", "--threshold=0.5")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "geometric mean of 2 cases" in result.stdout
    assert "lost most: calls: one shape" in result.stdout


def test_a_slower_commit_is_found(tmp_path: Path) -> None:
    """A folder with the installed package, whose every call waits."""
    import reparam_fused

    installed = Path(reparam_fused.__file__).parent
    package = tmp_path / "reparam_fused"
    package.mkdir()
    for path in installed.iterdir():
        (package / path.name).symlink_to(path)
    slow = package / "functional.py"
    text = slow.read_text()
    slow.unlink()
    needle = "    return _call.reparameterize(\n"
    assert text.count(needle) == 1
    slow.write_text(text.replace(needle, f"    __import__('time').sleep(1e-4)\n{needle}"))
    result = compare("installed", str(tmp_path), CASE, "--seconds=0.2", "--threshold=0.5")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "slower than 0.5 allows: calls: one shape" in result.stdout


def test_every_aim_is_one_of_a_case() -> None:
    """One whose name nothing has would never be missed."""
    aims = script("aims")
    named = {(str(c).removesuffix(f", {c.passes}"), c.passes) for c in cases.cases()}
    assert aims.AIM.keys() <= named
