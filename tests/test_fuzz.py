"""A sample of the hostile calls of fuzz.py, each the same every time.

Red where a call ends the process, hangs, gives another answer than the reference, raises in other
words than its own, or raises and leaves an input or a generator changed; and where the fuzzer no
longer reaches a function, or sees what it is to see.
"""

from __future__ import annotations

from typing import Any

import fuzz
import pytest
import torch
from fuzz import EITHER, REFUSE, TAKE, Given, Plan
from helpers import needs_kernels

import reparam_fused
from reparam_fused import fused_reparameterize, key

pytestmark = needs_kernels


def test_hostile_calls() -> None:
    report = fuzz.fuzz(calls=2000, seed=0)
    assert not report.findings, "\n".join(f"{f.index}: {f.what}\n{f.call}" for f in report.findings)
    assert sum(report.outcomes.values()) == 2000
    # Each is taken, and refused, at least once.
    taken = {name.split(".")[0] for name, outcome in report.outcomes if outcome == "taken"}
    assert taken >= {*reparam_fused.__all__, "ops"} - {"backends"}
    for name in fuzz.PLANS:
        assert any(of.startswith(name) for of, _ in report.outcomes), name
        assert any(of.startswith(name) for of, how in report.outcomes if how != "taken"), name


def test_a_call_depends_on_its_number_alone() -> None:
    device = torch.device("cpu")
    some = [str(fuzz.plan_of(5, index, device)).split("(")[0] for index in range(20)]
    again = [str(fuzz.plan_of(5, index, device)).split("(")[0] for index in reversed(range(20))]
    assert some == again[::-1]
    assert len(set(some)) > 3


def raising(error: BaseException) -> Any:
    def function(**_: Any) -> None:
        raise error

    return function


def drawing(**_: Any) -> None:
    torch.rand(())
    raise RuntimeError("f(): mu is wrong")


def writing(mu: Any) -> Any:
    mu.add_(1)
    return mu


MU = "f(): mu is wrong"


@pytest.mark.parametrize(
    ("function", "verdict", "finding"),
    [
        (raising(TypeError(MU)), REFUSE, ""),
        (raising(TypeError(MU)), EITHER, ""),
        (lambda **_: None, EITHER, ""),
        (raising(TypeError(MU)), TAKE, "a good call was refused"),
        (lambda **_: None, REFUSE, "a bad call was taken"),
        (raising(KeyError("mu")), REFUSE, "KeyError is not for bad arguments"),
        (raising(TypeError("mu is wrong")), REFUSE, "does not name the function"),
        (raising(TypeError("f(): wrong")), REFUSE, "names no argument"),
        (raising(RuntimeError("INTERNAL ASSERT FAILED")), REFUSE, "an internal assertion"),
        (drawing, REFUSE, "a generator had moved"),
        (writing, TAKE, "an input was changed"),
    ],
)
def test_what_is_wrong_is_found(function: Any, verdict: int, finding: str) -> None:
    plan = Plan("f", function, {"mu": Given(torch.zeros(2), verdict)})
    _, found = fuzz.run(plan)
    assert finding in found
    assert bool(found) == bool(finding)


def test_a_wrong_answer_is_found() -> None:
    mu, k = torch.zeros(3), key(1)
    plan = Plan("fused_reparameterize", fused_reparameterize, {"mu": Given(mu), "std": Given(1.0)})
    plan.arguments["key"] = Given(k)
    for expected, finding in (
        (reparam_fused.noise(k, 3), ""),
        (mu, "other bits"),
        (mu[:1], "(1,)"),
    ):
        plan.expected = lambda expected=expected: expected
        plan.maker = fuzz.Maker(fuzz.random.Random(0), 0.0, mu.device)
        assert finding in fuzz.run(plan)[1]


def test_a_process_that_ends_or_is_silent_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of its call; the calls after it are made."""
    program = (
        "import os, sys, time\n"
        "first = int(sys.argv[sys.argv.index('--first') + 1])\n"
        "last = first + int(sys.argv[sys.argv.index('--calls') + 1])\n"
        "for i in range(first, last):\n"
        "    print('at', i, 'f', sep='\\t', flush=True)\n"
        "    if i == 3: os.abort()\n"
        "    if i == 5: time.sleep(100)\n"
        "    print('did', i, 'f', 'taken', '', '', sep='\\t', flush=True)\n"
    )
    popen = fuzz.subprocess.Popen
    monkeypatch.setattr(fuzz, "LIMIT", 3.0)
    monkeypatch.setattr(
        fuzz.subprocess,
        "Popen",
        lambda command, **options: popen([command[0], "-c", program, *command[2:]], **options),
    )
    report = fuzz.fuzz(calls=8, seed=0)
    assert report.outcomes == {("f", "taken"): 6, ("f", "crash"): 1, ("f", "hang"): 1}
    found = [(finding.index, finding.what) for finding in report.findings]
    assert found == [(3, "the process ended by SIGABRT"), (5, "no answer in 3 s")]
