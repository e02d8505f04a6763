"""python -m reparam_fused check: what it reports, and that it fails where it should.

No GPU runs here. The checks of gpu.py run on CPU tensors with stand-ins for
torch.cuda: that shows their control flow and that they can fail, and nothing of a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reparam_fused
from reparam_fused import _ops, check, reference
from reparam_fused.check import bits, gpu, noise, result, speed, state

CPU = torch.device("cpu")
COMMON = list(check.CHECKS)
GPU_ONLY = [*check.GPU_CHECKS, *check.GPU_TIMINGS]
has_gpu = torch.cuda.is_available()
Run = tuple[subprocess.CompletedProcess[str], dict[str, Any]]


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reparam_fused", "check", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("check")
    done = command("--json", "report.json", cwd=folder)
    assert [p.name for p in folder.iterdir()] == ["report.json"], done.stderr
    return done, json.loads((folder / "report.json").read_text())


def test_this_installation_passes(full_run: Run) -> None:
    done, report = full_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["summary"]["fail"] == 0
    assert done.stdout.splitlines()[-1].startswith(f"{report['summary']['pass']} passed, 0 failed")


def test_the_table_has_every_check(full_run: Run) -> None:
    done, report = full_run
    names = [(r["device"], r["name"]) for r in report["results"]]
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if has_gpu else []
    expected = [("cpu", name) for name in [*COMMON, *check.CPU_TIMINGS]]
    for device in gpus:
        expected += [(device, name) for name in [*COMMON, *GPU_ONLY]]
    if not gpus:
        expected += [("cuda", name) for name in GPU_ONLY]
    assert names == expected
    lines = done.stdout.splitlines()
    for r in report["results"]:
        (line,) = [x for x in lines if x.split()[1:2] == [r["device"]] and f"  {r['name']} " in x]
        assert line.startswith(r["status"])
        assert line.endswith(r["detail"])


def test_the_json_is_complete(full_run: Run) -> None:
    done, report = full_run
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["reparam_fused"] == reparam_fused.__version__
    assert report["backends"] == reparam_fused.backends()
    for name, text in report["backends"].items():
        assert f"backend {name}: {text}" in done.stdout
    for r in report["results"]:
        assert r["detail"], r["name"]  # of a skip, the reason
        assert r["status"] in {"pass", "skip"}
        assert r["seconds"] > 0 or r["status"] == "skip"
    by_name = {r["name"]: r for r in report["results"] if r["device"] == "cpu"}
    assert by_name["statistics float32"]["numbers"]["n"] == 2**22
    assert by_name["time"]["numbers"]["fused seconds"] > 0
    assert by_name["digest float32"]["numbers"]["sha256"] == bits.DIGESTS[torch.float32]


@pytest.mark.parametrize("dtype", bits.DIGESTS, ids=str)
def test_digests_are_those_of_the_reference(dtype: torch.dtype) -> None:
    def results() -> Iterator[Tensor]:
        for x, log_var, key in bits.digest_calls(dtype):
            yield reference.sample_from_key(x, log_var, key)
            yield reference.sample_backward(x, log_var, key)

    assert bits.digest(results()) == bits.DIGESTS[dtype]


def test_known_answers_are_those_of_the_test_data() -> None:
    data = Path(__file__).parent / "data"
    rows = (data / "philox4x32_10.txt").read_text().splitlines()[2:]
    for row, (counter, seed, expected) in zip(rows, bits.PHILOX, strict=True):
        assert row.split() == [*counter.split(), seed[8:], seed[:8], *expected.split()]
    assert bits.FIRST_NORMALS in (data / "noise.txt").read_text()
    published = [-0.970190, 0.194019, -1.235621, 1.923927, -0.073182]
    words = torch.tensor([int(w, 16) for w in bits.FIRST_NORMALS.split()]).to(torch.uint32)
    assert words.view(torch.float32)[:5].tolist() == pytest.approx(published, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "unknown device 'tpu': expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "device 'cuda:99': "),
        (["--json", "no/such/folder/x.json"], "cannot write 'no/such/folder/x.json'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        check.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def off_by_an_ulp(mu: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
    z = reference.sample_from_key(mu, log_var, key)
    return torch.nextafter(z, torch.full_like(z, torch.inf)) if z.dtype == torch.float32 else z


def test_a_broken_op_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit status 1, the failing checks by name, and the others still run."""
    names = ["known answers", "layouts", "extreme values", "saved tensors"]
    monkeypatch.setattr(check, "CHECKS", {name: check.CHECKS[name] for name in names})
    monkeypatch.setattr(_ops, "sample_from_key", off_by_an_ulp)
    path = tmp_path / "report.json"
    assert check.main(["--device", "cpu", "--quick", "--json", str(path)]) == 1
    out = capsys.readouterr().out
    failed = "failed are extreme values, known answers, layouts"
    assert out.splitlines()[-1] == f"1 passed, 3 failed, 0 skipped: {failed}"
    report = json.loads(path.read_text())
    assert [r["status"] for r in report["results"]] == ["fail", "fail", "fail", "pass"]
    assert "elements differ, first at 0" in report["results"][1]["detail"]
    assert "Traceback" in report["results"][1]["traceback"]


def test_a_check_that_raises_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def raises(device: torch.device) -> result.Result:
        raise ValueError("of some\nlines")

    def not_a_number(device: torch.device) -> result.Result:
        return result.passed("fine", mean=float("nan"))

    monkeypatch.setattr(check, "CHECKS", {"first": raises, "second": not_a_number})
    path = tmp_path / "report.json"
    assert check.main(["--device", "cpu", "--quick", "--json", str(path)]) == 1
    first, second = json.loads(path.read_text())["results"]
    assert (first["status"], first["detail"]) == ("fail", "ValueError: of some lines")
    assert (second["status"], second["numbers"]) == ("pass", {"mean": "nan"})
    assert "1 passed, 1 failed, 0 skipped: failed are first" in capsys.readouterr().out


def forgets_the_last(mu: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
    z = torch.empty_like(torch.add(mu, log_var))
    if z.dim() != 1:
        return reference.sample_from_key(mu, log_var, key)
    z[:-1] = reference.sample_from_key(mu, log_var, key)[:-1]
    return z


def no_noise(mu: Tensor, log_var: Tensor, **_: Any) -> Tensor:
    return mu + torch.exp(0.5 * log_var)


def half_the_gradient(mu: Tensor, log_var: Tensor, *, key: Tensor) -> Tensor:
    z = reparam_fused.fused_reparameterize(mu, log_var, key=key)
    return (z + z.detach()) / 2


def keeps_sigma(mu: Tensor, log_var: Tensor, *, key: Tensor | None) -> Tensor:
    return mu + torch.exp(0.5 * log_var)


def cancels(mu: Tensor, log_var: Tensor) -> Tensor:
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var)


SABOTAGE: list[tuple[Callable[[], result.Result], Any, str, Any, str]] = [
    (
        lambda: bits.sizes(CPU, torch.float16),
        _ops,
        "sample_from_key",
        forgets_the_last,
        "1 elements, offset 0",
    ),
    (
        lambda: bits.digest_as_expected(CPU, torch.float32),
        bits,
        "fused_reparameterize",
        no_noise,
        "sha256",
    ),
    (lambda: bits.divergence(CPU), _ops, "kl_divergence", cancels, "kl_divergence, (1,)"),
    (lambda: state.gradients(CPU), state, "fused_reparameterize", half_the_gradient, "Jacobian"),
    (lambda: state.generators(CPU), state, "fused_reparameterize", no_noise, "the same noise"),
    (lambda: state.saved_tensors(CPU), state, "fused_reparameterize", keeps_sigma, "are saved"),
]


@pytest.mark.parametrize(
    ("run", "module", "name", "broken", "message"), SABOTAGE, ids=[s[4] for s in SABOTAGE]
)
def test_each_check_finds_what_it_is_for(
    run: Callable[[], result.Result],
    module: Any,
    name: str,
    broken: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, name, broken)
    failed = check.run_check("x", lambda device: run(), CPU)
    assert failed.status == "fail"
    assert message in failed.detail


@pytest.mark.parametrize(
    ("broken", "figure"),
    [
        (lambda eps: eps * 1.01, "variance"),
        (lambda eps: eps.clamp(-4.5, 4.5), "largest"),
        (lambda eps: eps.index_fill(0, torch.tensor([7]), torch.nan), "mean"),
        (lambda eps: eps.view(-1, 2)[:, :1].expand(-1, 2).reshape(-1), "neighbours"),
    ],
)
def test_statistics_that_are_wrong(
    broken: Callable[[Tensor], Tensor], figure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "N", 1 << 18)
    draw = reparam_fused.noise
    monkeypatch.setattr(noise, "noise", lambda *a, **k: broken(draw(*a, **k)))
    report = noise.statistics(CPU, torch.float32)
    assert report.status == "fail"
    assert figure in report.detail.partition(" out of bounds")[0]


class StandInGraph:
    """Replays by calling the step again."""

    def __init__(self, step: gpu.Step) -> None:
        self.step = step
        self.static = step()

    def replay(self) -> None:
        for static, value in zip(self.static, self.step(), strict=True):
            static.copy_(value)


class StandInStream:
    def wait_stream(self, other: object) -> None: ...


class StandInEvent:
    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: StandInEvent) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def stand_in_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(step: gpu.Step, device: torch.device) -> tuple[Any, Tensor, Tensor]:
        graph = StandInGraph(step)
        return graph, *graph.static

    def nothing(*_: object) -> None: ...

    monkeypatch.setattr(gpu, "_captured", captured)
    monkeypatch.setattr(gpu, "gpu_kernels_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "manual_seed", torch.manual_seed)
    for name in ("synchronize", "_sleep", "empty_cache", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, nothing)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: StandInStream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: StandInStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))


@pytest.mark.parametrize("name", ["graph replay", "graph key", "side stream", "no synchronisation"])
def test_control_flow_of_gpu_checks(stand_in_cuda: None, name: str) -> None:
    assert check.run_check(name, check.GPU_CHECKS[name], CPU).status == "pass"


def test_windows_of_a_large_tensor(stand_in_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 2**18 + 3
    assert gpu.more_than_2_31_elements(CPU, n).status == "pass"
    op = _ops.sample_backward

    def wrong_at_the_end(x: Tensor, log_var: Tensor, key: Tensor) -> Tensor:
        result = op(x, log_var, key).contiguous()
        result.view(-1)[-1] += 1
        return result

    monkeypatch.setattr(_ops, "sample_backward", wrong_at_the_end)
    with pytest.raises(AssertionError, match=f"{n} elements from .*: 1 of"):
        gpu.more_than_2_31_elements(CPU, n)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**10, 2**40))
    assert gpu.more_than_2_31_elements(CPU, n).status == "skip"


def test_replays_that_are_wrong(stand_in_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise each time; a backward of other noise than its forward; another key."""
    key = reparam_fused.key(1)
    fused = reparam_fused.fused_reparameterize
    monkeypatch.setattr(gpu, "fused_reparameterize", lambda m, v: fused(m, v, key=key))
    with pytest.raises(AssertionError, match="replays 0 and 1 have the same noise"):
        gpu.graph_replay(CPU)

    def two_noises(mu: Tensor, log_var: Tensor) -> Tensor:
        return fused(mu, log_var.detach()) + (y := fused(mu, log_var)) - y.detach()

    monkeypatch.setattr(gpu, "fused_reparameterize", two_noises)
    with pytest.raises(AssertionError, match="replay 0: forward and backward differ"):
        gpu.graph_replay(CPU)

    sample = _ops.sample
    monkeypatch.setattr(_ops, "sample", lambda *a: (sample(*a)[0], key.clone()))
    with pytest.raises(AssertionError, match="replay 0, key"):
        gpu.graph_key(CPU)


@pytest.mark.parametrize("compiles", [True, False])
def test_control_flow_of_gpu_timings(
    stand_in_cuda: None, monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    def compile(function: speed.Sampler, dynamic: bool) -> speed.Sampler:
        if not compiles:
            raise RuntimeError("no triton")
        return function

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(speed, "FLUSH_BYTES", 1)
    report = speed.gpu_bandwidth(CPU, torch.bfloat16, 1 << 12)
    assert report.status == "pass"
    for case in ("forward", "backward", "both"):
        assert f"{case} " in report.detail
        assert float(report.numbers[f"{case} GB/s"]) > 0
        assert float(report.numbers[f"{case} copy seconds"]) > 0
    assert ("forward compile seconds" in report.numbers) == compiles
    assert report.numbers.get("compile missing") == (
        None if compiles else "RuntimeError: no triton"
    )
