"""python -m reparam_fused check: what it reports, and that each row fails where it should."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ON_STAND_IN
from torch import Tensor

import reparam_fused
from reparam_fused import __main__, _extensions, _ops, check, reference
from reparam_fused.check import bits, calls, gpu, parts, timings

CPU = torch.device("cpu")
COMMON = check.CHECKS | check.TIMINGS
Run = tuple[subprocess.CompletedProcess[str], dict[str, Any]]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("check")
    done = subprocess.run(
        [sys.executable, "-m", "reparam_fused", "check", "--json", "report.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, json.loads((folder / "report.json").read_text())


def test_this_installation_passes(full_run: Run) -> None:
    done, report = full_run
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["summary"]["fail"] == 0
    assert done.stdout.splitlines()[-1].startswith(f"{report['summary']['pass']} passed, 0 failed")


def test_the_table_has_every_check(full_run: Run) -> None:
    done, report = full_run
    expected = [("cpu", name) for name in COMMON]
    for device in check.gpus():
        expected += [(str(device), name) for name in check.GPU_CHECKS | COMMON]
    assert [(r["device"], r["name"]) for r in report["results"]] == expected
    lines = done.stdout.splitlines()
    for r in report["results"]:
        (line,) = [x for x in lines if x.split()[1:2] == [r["device"]] and f"  {r['name']} " in x]
        assert line.startswith(r["status"])
        assert line.endswith(r["detail"])
        assert r["detail"]
        assert r["seconds"] > 0


def test_the_header_is_the_environment(full_run: Run) -> None:
    done, report = full_run
    facts = report["environment"]
    assert facts["torch"] == torch.__version__
    assert facts["reparam_fused"] == reparam_fused.__version__
    assert {f"backend {k}": v for k, v in reparam_fused.backends().items()}.items() <= facts.items()
    assert done.stdout.startswith("\n".join(f"{k}: {v}" for k, v in facts.items()) + "\n\n")


def test_quick_leaves_out_the_timings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "CHECKS", {"first": lambda device: "fine"})
    monkeypatch.setattr(check, "TIMINGS", {"second": lambda device: "fast"})
    assert __main__.main(["check", "--device", "cpu"]) == 0
    assert "2 passed, 0 failed, 0 skipped" in capsys.readouterr().out
    assert __main__.main(["check", "--device", "cpu", "--quick"]) == 0
    assert "1 passed, 0 failed, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", bits.DIGESTS, ids=str)
def test_digests_are_those_of_the_reference(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as bits.compare says
    try:
        given = [getattr(reference, op)(*xs, *options) for op, xs, options in bits.cases(dtype)]
    finally:
        torch.set_num_threads(threads)
    results = [t for one in given for t in (one if isinstance(one, tuple) else (one,))]
    assert bits.digest(results) == bits.DIGESTS[dtype]
    monkeypatch.setattr(bits, "SEED", 1)
    with pytest.raises(AssertionError, match="sha256"):
        bits.values(CPU, dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "no device 'tpu': found are ['cpu'"),
        (["--device", "cuda:99"], "no device 'cuda:99': "),
        (["--json", "no/such/folder/x.json"], "can't open 'no/such/folder/x.json'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        __main__.main(["check", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_check_that_raises_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit status 1, the failing check by name, and the others still run."""

    def raises(device: torch.device) -> str:
        raise ValueError("of some\nlines")

    def skips(device: torch.device) -> str:
        raise parts.Skip("not here")

    fine = {"third": lambda device: "fine"}
    monkeypatch.setattr(check, "CHECKS", {"first": raises, "second": skips, **fine})
    path = tmp_path / "report.json"
    assert __main__.main(["check", "--device", "cpu", "--quick", "--json", str(path)]) == 1
    ending = "1 passed, 1 failed, 1 skipped: failed are first"
    assert capsys.readouterr().out.splitlines()[-1] == ending
    first, second, third = json.loads(path.read_text())["results"]
    assert (first["status"], first["detail"]) == ("fail", "ValueError: of some lines")
    assert "in raises" in first["traceback"]
    assert (second["status"], second["detail"]) == ("skip", "not here")
    assert (third["status"], third["detail"]) == ("pass", "fine")


# What is broken, by what, and what the row then says


def off_by_an_ulp(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(*args: Any) -> Tensor:
        z = op(*args)
        return torch.nextafter(z, torch.full_like(z, torch.inf)) if z.dtype == torch.float32 else z

    return broken


def forgets_the_last(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(*args: Any) -> Tensor:
        right = op(*args)
        z = torch.empty_like(right)
        z.view(-1)[:-1] = right.view(-1)[:-1]
        return z

    return broken


def of_other_strides(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: op(*args).contiguous()


def not_quite(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: op(*args) * (1 + 1e-12)


def cancels(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda mu, log_var: 0.5 * (mu.square() + log_var.exp() - 1 - log_var)


def too_wide(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **options: op(*args, **options) * 1.01


def lanes_repeated(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(*args: Any, **options: Any) -> Tensor:
        return op(*args, **options).view(-1, 2)[:, :1].repeat(1, 2).view(-1)

    return broken


def a_nan(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(*args: Any, **options: Any) -> Tensor:
        return op(*args, **options).index_fill(0, torch.tensor([7]), torch.nan)

    return broken


def half_the_gradient(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(mu: Tensor, log_var: Tensor, **options: Any) -> Tensor:
        z = op(mu, log_var, **options)
        return (z + z.detach()) / 2

    return broken


def no_noise(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda mu, log_var, **options: mu + torch.exp(0.5 * log_var)


def own_generator_ignored(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda mu, log_var, key=None, generator=None: op(mu, log_var, key=key)


class Clock:
    """That nothing moves on but what is slow, whatever else the machine does."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


def slow(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(mu: Tensor, log_var: Tensor) -> Tensor:
        CLOCK.now += 1
        return op(mu, log_var)

    return broken


SABOTAGE: list[tuple[str, Any, str, Any, str]] = [
    ("values torch.float32", _ops, "sample_from_key", off_by_an_ulp, "elements differ, first at 0"),
    ("values torch.float32", _ops, "sample_backward", of_other_strides, "instead of (device("),
    ("values torch.float64", _ops, "sample_backward", not_quite, "elements differ"),
    ("values torch.float64", _ops, "kl_divergence", cancels, "elements differ"),
    ("values torch.float16", _ops, "sample_from_key", forgets_the_last, "1 of 1 elements differ"),
    ("values torch.bfloat16", _ops, "kl_divergence_backward", forgets_the_last, "first at 0: nan"),
    ("statistics torch.float32", calls, "noise", too_wide, "standard errors"),
    ("statistics torch.float32", calls, "noise", a_nan, "standard errors"),
    ("statistics torch.float64", calls, "noise", lanes_repeated, "standard errors"),
    ("gradients", calls, "fused_reparameterize", half_the_gradient, "Jacobian"),
    ("generators", calls, "fused_reparameterize", no_noise, "the same noise"),
    ("generators", calls, "fused_reparameterize", own_generator_ignored, "after manual_seed"),
    ("time torch.float32", timings, "fused_reparameterize", slow, "eager 0."),
    ("time torch.bfloat16", timings, "fused_reparameterize", slow, "eager 0."),
]


@pytest.mark.parametrize(("name", "module", "attribute", "breaks", "message"), SABOTAGE)
def test_each_check_finds_what_it_is_for(
    name: str,
    module: Any,
    attribute: str,
    breaks: Callable[[Any], Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, attribute, breaks(getattr(module, attribute)))
    if breaks is slow:
        monkeypatch.setattr(timings, "time", CLOCK)
    row = check.run_check(name, COMMON[name], CPU)
    assert row["status"] == "fail"
    assert message in row["detail"]


@pytest.fixture
def caching(cuda: torch.device) -> Iterator[torch.device]:
    """A GPU with torch's caching allocator, which graphs need, and which counts."""
    torch._C._cuda_cudaCachingAllocator_enable(True)
    yield cuda
    torch._C._cuda_cudaCachingAllocator_enable(not ON_STAND_IN)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", check.GPU_CHECKS | check.CHECKS)
def test_a_gpu_passes(caching: torch.device, name: str, index: int) -> None:
    """Each row on each device, whichever is the current one."""
    if index >= torch.cuda.device_count():
        pytest.skip("one GPU")
    row = check.run_check(
        name, (check.GPU_CHECKS | check.CHECKS)[name], torch.device("cuda", index)
    )
    assert row["status"] in ("pass", "skip"), row["traceback"]
    if row["status"] == "skip":  # memory may be short on a GPU, not on the stand-in
        short = name == "2**31 elements" and not ON_STAND_IN
        assert short or not _extensions.has_cuda, row["detail"]


def one_key(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    own = parts.key_of(1, device="cuda")
    return lambda mu, log_var, key=None: op(mu, log_var, key=own if key is None else key)


def another_key(op: Callable[..., Any]) -> Callable[..., Any]:
    key = parts.key_of(1, device="cuda")
    return lambda *args: (op(*args)[0], key.clone())


def on_the_default_stream(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(*args: Tensor, **options: Any) -> Tensor:
        with torch.cuda.stream(torch.cuda.default_stream()):
            return op(*args, **options)

    return broken


def synchronises(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(*args: Tensor, **options: Any) -> Tensor:
        z = op(*args, **options)
        torch.cuda.synchronize()
        return z

    return broken


def generator_stays(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(mu: Tensor, log_var: Tensor, key: Any = None, generator: Any = None) -> Tensor:
        offset = generator.get_offset() if generator else 0
        z = op(mu, log_var, key=key, generator=generator)
        if generator:
            generator.set_offset(offset)
        return z

    return broken


def key_of_the_seed(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(mu: Tensor, log_var: Tensor, key: Any = None, generator: Any = None) -> Tensor:
        if key is None:
            op(mu, log_var, generator=generator)
            key = parts.key_of(generator.initial_seed(), device="cuda")
        return op(mu, log_var, key=key)

    return broken


def moves_by_elements(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By a counter for each four of any dtype: for float64 it is one for each two."""

    def broken(mu: Tensor, log_var: Tensor, key: Any = None, generator: Any = None) -> Tensor:
        offset = generator.get_offset() if generator else 0
        z = op(mu, log_var, key=key, generator=generator)
        if generator:
            generator.set_offset(offset + 4 * -(-z.numel() // 4))
        return z

    return broken


def key_without_a_domain(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """(seed, offset / 4), that of key(seed) where the offset is 0."""

    def broken(mu: Tensor, log_var: Tensor, key: Any = None, generator: Any = None) -> Tensor:
        if key is None:
            offset = generator.get_offset()
            op(mu, log_var, generator=generator)
            key = parts.key_of(generator.initial_seed(), offset // 4, device="cuda")
        return op(mu, log_var, key=key)

    return broken


def keeps_more_than_half_of_mu(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    kept = []

    def broken(mu: Tensor, log_var: Tensor) -> Tensor:
        kept.append(mu.detach()[: mu.numel() // 5 * 3].clone())
        return op(mu, log_var)

    return broken


def takes_the_memory_of_mu(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda mu, log_var: mu.add_(log_var)


def keeps_mu(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda mu, log_var: op(mu, log_var) + 0 * mu.detach() * log_var


def wrong_at_the_end(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def broken(*args: Any) -> Tensor:
        result = op(*args).contiguous()
        result.view(-1)[-1:] += 1
        return result

    return broken


GPU_SABOTAGE: list[tuple[str, Any, str, Any, str]] = [
    ("capture, first call", gpu, "fused_reparameterize", one_key, "with the same noise"),
    ("capture, warm", _ops, "sample", another_key, "the key it drew"),
    ("streams", gpu, "fused_reparameterize", on_the_default_stream, ""),
    ("streams", gpu, "fused_reparameterize", synchronises, "the host waited"),
    ("generator offset", gpu, "fused_reparameterize", generator_stays, "moved by 0, not 4"),
    ("generator offset", gpu, "fused_reparameterize", key_of_the_seed, "elements differ"),
    (
        "generator offset",
        gpu,
        "fused_reparameterize",
        moves_by_elements,
        "4 of torch.float64: moved by 4, not 8",
    ),
    ("generator offset", gpu, "fused_reparameterize", key_without_a_domain, "elements differ"),
    ("peak memory", gpu, "fused_reparameterize", keeps_mu, "tensors, expected 2"),
    ("peak memory", gpu, "fused_reparameterize", keeps_more_than_half_of_mu, "2.60 tensors, exp"),
    ("peak memory", gpu, "fused_reparameterize", takes_the_memory_of_mu, "1.00 tensors, expected"),
    ("triton", "reparam_fused.triton_kernels", "sample_from_key", off_by_an_ulp, "differ"),
    ("2**31 elements", _ops, "sample_backward", wrong_at_the_end, "1 of 4099 elements differ"),
]


@pytest.mark.parametrize(("name", "module", "attribute", "breaks", "message"), GPU_SABOTAGE)
def test_each_check_of_a_gpu_finds_what_it_is_for(
    caching: torch.device,
    name: str,
    module: Any,
    attribute: str,
    breaks: Callable[[Any], Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row_check = check.GPU_CHECKS[name]
    if name == "2**31 elements":
        row_check = partial(gpu.more_than_2_31_elements, n=2**18)
    row = check.run_check(name, row_check, caching)
    if row["status"] == "skip":
        pytest.skip(row["detail"])
    assert row["status"] == "pass", row["traceback"]
    if isinstance(module, str):
        module = pytest.importorskip(module)
    monkeypatch.setattr(module, attribute, breaks(getattr(module, attribute)))
    row = check.run_check(name, row_check, caching)
    assert row["status"] == "fail"
    assert message in row["detail"]


def test_every_row_has_its_sabotage() -> None:
    assert {s[0] for s in SABOTAGE} == COMMON.keys()
    assert {s[0] for s in GPU_SABOTAGE} == check.GPU_CHECKS.keys()
