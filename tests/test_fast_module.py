"""The compiled module takes the plain calls, those alone, and gives what the ops give."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CALLS_CAN_BE_PLAIN, assert_same_bits, inputs, key_of, needs_kernels, patience
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import reparam_fused
from reparam_fused import _extensions, _forms, _ops, fused_kl_divergence, fused_reparameterize

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(
        not CALLS_CAN_BE_PLAIN, reason="torch does not convert its tensors: no call is plain"
    ),
]

LOG_VAR_FORM, STD_FORM = _forms.SAMPLE["log_var"], _forms.SAMPLE["std"]
KL_FORM = _forms.KL_DIVERGENCE["log_var"]
NO_OPTIONS = (None, None)
KEY = key_of(3, 2**63)
KEYS = reparam_fused.split(KEY, 6)
MU, LOG_VAR = inputs(6, 40)


@contextmanager
def generators_left_alone() -> Iterator[torch.Generator]:
    """Neither torch's own generator nor the one that is given draws anything."""
    generator = torch.Generator()
    before = generator.get_state(), torch.get_rng_state()
    yield generator
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def launched(mu: Any, scale: Any, key: Any) -> list[Any]:
    """What the module gives with a key."""
    return [
        LOG_VAR_FORM.plain(mu, scale, key),
        STD_FORM.plain(mu, scale, key),
        LOG_VAR_FORM.plain_backward(mu, scale, key),
        STD_FORM.plain_backward(mu, None, key),
    ]


def by_the_module(mu: Any, scale: Any, key: Any, generator: Any) -> list[Any]:
    """What each of its functions gives. The fourth makes no use of the scale."""
    return [
        *launched(mu, scale, key),
        KL_FORM.plain(mu, scale, None),
        KL_FORM.plain_backward(mu, scale, None),
        LOG_VAR_FORM.plain_draw(mu, scale, None),
        STD_FORM.plain_draw(mu, scale, generator),
    ]


# 1. What is special about a thread


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


Body = Callable[[], None]


def calling(body: Body) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        body()
        return x * 1

    return function


def in_a_mode(mode: Any) -> Callable[[Body], None]:
    def run(body: Body) -> None:
        with mode():
            body()

    return run


THREADS: dict[str, Callable[[Body], Any]] = {
    "vmap": lambda body: torch.vmap(calling(body))(torch.zeros(2)),
    "grad": lambda body: torch.func.grad(calling(body))(torch.zeros(())),
    "jvp": lambda body: torch.func.jvp(calling(body), (torch.ones(1),), (torch.ones(1),)),
    "functionalize": lambda body: torch.func.functionalize(calling(body))(torch.zeros(2)),
    "dispatch mode": in_a_mode(Seen),
    "function mode": in_a_mode(Called),
    "tracer": lambda body: torch.jit.trace(calling(body), torch.zeros(2), check_trace=False),
    "forward-mode level": in_a_mode(forward_ad.dual_level),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("thread", THREADS)
def test_nothing_is_plain_where_calls_are_transformed(thread: str) -> None:
    results: list[Any] = []
    with generators_left_alone() as generator:
        THREADS[thread](lambda: results.extend(by_the_module(MU, LOG_VAR, KEY, generator)))
    assert results == [None] * 8


def test_randomness_under_vmap_is_as_asked_for() -> None:
    """Of tensors that no level batches, too."""

    def draw(_: Tensor) -> Tensor:
        return fused_reparameterize(MU, LOG_VAR)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(draw)(torch.zeros(4))
    different = torch.vmap(draw, randomness="different")(torch.zeros(4))
    assert different.unique(dim=0).shape == (4, *MU.shape)
    same = torch.vmap(draw, randomness="same")(torch.zeros(4))
    assert same.unique(dim=0).shape == (1, *MU.shape)


def test_a_transform_may_close_over_parameters() -> None:
    """Which require a gradient of another level than the one that is being taken."""
    mu = torch.nn.Parameter(MU)

    def weigh(x: Tensor) -> Tensor:
        return (x * fused_reparameterize(mu, LOG_VAR, key=KEY)).sum()

    expected = fused_reparameterize(MU, LOG_VAR, key=KEY)
    assert_same_bits(torch.func.grad(weigh)(torch.ones_like(MU)), expected)
    torch.vmap(weigh)(torch.ones(2, *MU.shape)).sum().backward()
    assert mu.grad is not None
    assert torch.equal(mu.grad, torch.full_like(MU, 2.0))


def test_a_dispatch_mode_sees_the_ops() -> None:
    with Seen() as seen:
        fused_reparameterize(MU, LOG_VAR, key=KEY)
        fused_reparameterize(MU, LOG_VAR)
        fused_kl_divergence(MU, LOG_VAR)
    ours = [op for op in seen.ops if op.namespace == "reparam_fused"]
    assert ours == [_ops.sample_from_key, _ops.sample, _ops.kl_divergence]


def test_a_function_mode_sees_the_functions() -> None:
    with Called() as called:
        fused_reparameterize(MU, LOG_VAR, key=KEY)
        fused_reparameterize(MU, LOG_VAR)
        fused_kl_divergence(MU, LOG_VAR)
    ours = [f for f in called.functions if f in (fused_reparameterize, fused_kl_divergence)]
    assert ours == [fused_reparameterize, fused_reparameterize, fused_kl_divergence]


@pytest.mark.filterwarnings("ignore")
def test_a_trace_computes_again() -> None:
    traced = torch.jit.trace(fused_kl_divergence, (MU, LOG_VAR), check_trace=False)
    torch.testing.assert_close(traced(LOG_VAR, MU), fused_kl_divergence(LOG_VAR, MU))


def test_tangents_go_through() -> None:
    with forward_ad.dual_level():
        mu = forward_ad.make_dual(MU, LOG_VAR)
        for z in (fused_reparameterize(mu, LOG_VAR, key=KEY), fused_reparameterize(mu, LOG_VAR)):
            tangent = forward_ad.unpack_dual(z).tangent
            assert tangent is not None
            assert torch.equal(tangent, LOG_VAR)
        kl = forward_ad.unpack_dual(fused_kl_divergence(mu, LOG_VAR)).tangent
        assert kl is not None
        torch.testing.assert_close(kl, MU * LOG_VAR)


# 2. What is special about a tensor


class Subclass(Tensor):
    pass


def escaped(transform: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    """The wrapper of a tensor that has outlived the transform which made it."""

    def wrapped(t: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            kept.append(x)
            return x.sum()

        transform(keep)(t)
        return kept[0]

    return wrapped


def zeros_without_memory(t: Tensor) -> Tensor:
    return torch._efficientzerotensor(t.shape)


# Tensors with the values of the one that is given, or without any values
READABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "subclass": lambda t: t.as_subclass(Subclass),
    "neg view": lambda t: torch._neg_view(-t),
    "functional wrapper": torch._to_functional_tensor,  # type: ignore[attr-defined]
    "dead wrapper of grad": escaped(torch.func.grad),
    "dead wrapper of functionalize": escaped(torch.func.functionalize),
}
OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "efficient zeros": zeros_without_memory,
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "dead wrapper of vmap": escaped(torch.vmap),
    "meta": lambda t: t.to("meta"),
    "sparse": Tensor.to_sparse,
    "compressed rows": Tensor.to_sparse_csr,
    "mkldnn": Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "nested, jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "integers": Tensor.int,
    "complex": Tensor.cfloat,
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "of another shape": lambda t: t[:5, :3],
    "empty": lambda t: t[:0],
    "number": lambda t: 0.5,
    "list": Tensor.tolist,
    "none": lambda t: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [*READABLE, *OTHERS])
def test_no_call_of_a_special_tensor_is_plain(kind: str) -> None:
    special = (READABLE | OTHERS)[kind]
    with generators_left_alone() as generator:
        by_mu = by_the_module(special(MU), LOG_VAR, KEY, generator)
        by_scale = by_the_module(MU, special(LOG_VAR), KEY, generator)
    del by_scale[3]
    if kind == "of another shape":
        del by_mu[3]
    assert by_mu == [None] * len(by_mu)
    assert by_scale == [None] * len(by_scale)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", READABLE)
def test_the_values_of_special_tensors_are_those_that_count(kind: str) -> None:
    mu, log_var = (READABLE[kind](t) for t in (MU, LOG_VAR))
    z, kl = fused_reparameterize(MU, LOG_VAR, key=KEY), fused_kl_divergence(MU, LOG_VAR)
    torch.manual_seed(3)
    drawn = fused_reparameterize(MU, LOG_VAR)
    for x, scale in ((mu, LOG_VAR), (MU, log_var), (mu, log_var)):
        torch.manual_seed(3)
        for result, expected in (
            (fused_reparameterize(x, scale, key=KEY), z),
            (fused_reparameterize(x, scale), drawn),
            (fused_kl_divergence(x, scale), kl),
        ):
            assert type(result) is (Subclass if kind == "subclass" else Tensor)
            if torch._is_functional_tensor(result):
                torch._sync(result)  # type: ignore[attr-defined]
                result = torch._from_functional_tensor(result)
            assert_same_bits(result.as_subclass(Tensor), expected)


def test_zeros_without_memory_are_zeros() -> None:
    nothing, zero = zeros_without_memory(MU), torch.zeros_like(MU)
    for mu, log_var, a, b in (
        (nothing, LOG_VAR, zero, LOG_VAR),
        (MU, nothing, MU, zero),
        (nothing, nothing, zero, zero),
    ):
        assert_same_bits(
            fused_reparameterize(mu, log_var, key=KEY), fused_reparameterize(a, b, key=KEY)
        )
        assert_same_bits(fused_kl_divergence(mu, log_var), fused_kl_divergence(a, b))


def test_tensors_without_values_give_such_tensors() -> None:
    z = fused_reparameterize(*(t.to("meta") for t in (MU, LOG_VAR)), key=KEY.to("meta"))
    assert (z.device.type, z.shape) == ("meta", MU.shape)
    with FakeTensorMode() as mode:
        mu, log_var, key = (mode.from_tensor(t) for t in (MU, LOG_VAR, KEY))
    for result in (fused_reparameterize(mu, log_var, key=key), fused_kl_divergence(mu, log_var)):
        assert isinstance(result, FakeTensor)
        assert result.shape == MU.shape


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    ["sparse", "compressed rows", "mkldnn", "nested", "quantized", "integers", "complex", "float8",
     "of another shape", "list"],
)  # fmt: skip
def test_what_is_no_operand_is_refused_by_name(kind: str) -> None:
    with generators_left_alone() as generator:
        for mu, log_var in ((OTHERS[kind](MU), LOG_VAR), (MU, OTHERS[kind](LOG_VAR))):
            for options in ({"key": KEY}, {"generator": generator}, {}):
                with pytest.raises((TypeError, RuntimeError), match=r"^fused_reparameterize\(\): "):
                    fused_reparameterize(mu, log_var, **options)
            with pytest.raises((TypeError, RuntimeError), match=r"^fused_kl_divergence\(\): "):
                fused_kl_divergence(mu, log_var)


BAD_KEYS: dict[str, Any] = {
    "one word": KEY[:1],
    "no dimensions": KEY[0],
    "of another batch": KEYS[:5],
    "of more dimensions": KEYS.reshape(6, 1, 1, 2),
    "of floats": KEY.double(),
    "of 32 bits": KEY.int(),
    "meta": KEY.to("meta"),
    "number": 3,
}


@pytest.mark.parametrize("kind", BAD_KEYS)
def test_no_call_with_a_bad_key_is_plain(kind: str) -> None:
    with generators_left_alone():
        assert launched(MU, LOG_VAR, BAD_KEYS[kind]) == [None] * 4
        with pytest.raises((TypeError, RuntimeError, ValueError), match="key"):
            fused_reparameterize(MU, LOG_VAR, key=BAD_KEYS[kind])


def test_a_key_of_a_subclass_is_left_to_the_op() -> None:
    key = KEY.as_subclass(Subclass)
    assert launched(MU, LOG_VAR, key) == [None] * 4
    z = fused_reparameterize(MU, LOG_VAR, key=key)
    assert type(z) is Subclass
    assert_same_bits(z.as_subclass(Tensor), fused_reparameterize(MU, LOG_VAR, key=KEY))


def test_nothing_on_a_gpu_is_plain(cuda: torch.device) -> None:
    on_gpu = [t.to(cuda) for t in (MU, LOG_VAR, KEY)]
    with generators_left_alone() as generator:
        assert by_the_module(*on_gpu, generator) == [None] * 8
        for at in range(3):
            given = [MU, LOG_VAR, KEY]
            given[at] = on_gpu[at]
            assert launched(*given)[0] is None


def test_ids_that_name_nothing_are_left_to_the_op() -> None:
    module = _extensions.module
    assert module is not None
    ops = module.kernels()["ops"].values()
    for op in range(-1, 8):
        for form in range(-1, 6):
            if op not in ops or form not in range(len(_forms.FORMS)):
                assert module.launch(op, form, MU, LOG_VAR, KEY, *NO_OPTIONS) is None
                assert module.launch(op, form, MU, LOG_VAR, None, *NO_OPTIONS) is None
    assert KL_FORM.plain(MU, LOG_VAR, KEY) is None
    assert LOG_VAR_FORM.plain(MU, LOG_VAR, None) is None
    for form in (-1, len(_forms.FORMS), 2**40):
        assert module.draw(form, MU, LOG_VAR, None, *NO_OPTIONS) is None
    for generator in (3, MU, KEY, torch.device("cpu")):
        assert module.draw(0, MU, LOG_VAR, generator, *NO_OPTIONS) is None
    for options in ((3, None), ((0.0, 1.0), None), (("a", 1.0, 0.0), None), (None, "a")):
        assert module.draw(0, MU, LOG_VAR, None, *options) is None
        assert module.launch(0, 0, MU, LOG_VAR, KEY, *options) is None
    with pytest.raises(TypeError, match="expected op, form, x, scale, key, bounds, samples"):
        module.launch(0, 0, MU)


# 3. The calls that are plain

OPERANDS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "alike": lambda x, s: (x, s),
    "broadcast": lambda x, s: (x, s[:1]),
    "one for all": lambda x, s: (x, s[0, 0]),
    "of more rows": lambda x, s: (x[:, :1], s[:1]),
    "halves": lambda x, s: torch.cat([x, s], 1).chunk(2, 1),  # type: ignore[dict-item]
    "transposed": lambda x, s: (x.t(), s.t()),
    "mixed": lambda x, s: (x, s.half()),
    "parameter": lambda x, s: (torch.nn.Parameter(x, requires_grad=False), s),
}


def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets the name of each op of ours that is called."""
    called: list[str] = []

    def counting(name: str) -> Callable[..., Any]:
        op = getattr(_ops, name)

        def count(*arguments: Any) -> Any:
            called.append(name)
            return op(*arguments)

        return count

    for name in (*_ops._CHECKS, "sample"):
        monkeypatch.setattr(_ops, name, counting(name))
    return called


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_plain_calls_go_through_no_op(
    operands: str, grad: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = dispatched(monkeypatch)
    x, s = OPERANDS[operands](MU.to(dtype), LOG_VAR.to(dtype))
    if grad:
        x, s = (t.detach().requires_grad_() for t in (x, s))
    batch = x.shape[0]
    keys = reparam_fused.split(KEY, batch)
    called.clear()  # split is an op
    every_other = torch.stack([KEY, KEY]).t()[:, 0]
    results = [
        fused_reparameterize(x, **{form: s}, **options)
        for form in ("log_var", "std")
        for options in (
            {},
            {"generator": torch.Generator()},
            {"key": KEY},
            {"key": KEY.view(torch.int64)},
            {"key": keys},
            {"key": every_other},
        )
    ]
    results.append(fused_kl_divergence(x, s))
    if grad:
        for result in results:
            torch.autograd.grad(result, (x, s), torch.ones_like(result))
    assert called == []


def test_keys_of_one_go_through_no_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called = dispatched(monkeypatch)
    reparam_fused.split(KEY, 3)
    reparam_fused.fold_in(KEY, 3)
    assert called == []
    reparam_fused.split(KEYS, 3)
    reparam_fused.fold_in(KEYS, 3)
    assert called == ["derive", "derive"]


def test_counting_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a call that is not plain."""
    called = dispatched(monkeypatch)
    x = torch._neg_view(MU)
    fused_reparameterize(x, LOG_VAR, key=KEY)
    fused_reparameterize(x, LOG_VAR)
    fused_kl_divergence(x, LOG_VAR)
    assert called == ["sample_from_key", "sample", "kl_divergence"]


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("bounds", [None, (-1.0, 0.5, 0.125)], ids=["free", "bounded"])
@pytest.mark.parametrize("form", _forms.SAMPLE.values(), ids=_forms.SAMPLE)
def test_the_module_gives_what_the_ops_give(
    operands: str, form: _forms.Call, bounds: _forms.Bounds | None, dtype: torch.dtype
) -> None:
    x, s = OPERANDS[operands](MU.to(dtype), LOG_VAR.to(dtype))
    form = form._replace(bounds=bounds)
    name = form.form.name
    scale = s if form.backward_reads() else None
    kl = form._replace(draws=False)
    pairs = [
        (kl.plain(x, s, None), _ops.kl_divergence(x, s, name, bounds)),
        (kl.plain_backward(x, s, None), _ops.kl_divergence_backward(x, s, name, bounds)),
    ]
    torch.manual_seed(3)
    drawn = form.plain_draw(x, s, None)
    torch.manual_seed(3)
    pairs.append((drawn, _ops.sample(x, s, None, name, bounds)[0]))
    drawn = form.plain_draw(x, s, torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    pairs.append((drawn, _ops.sample(x, s, generator, name, bounds)[0]))
    for key in (KEY, reparam_fused.split(KEY, x.shape[0]), torch.stack([KEY, KEY]).t()[:, 0]):
        options = (key, name, None, None, bounds)
        pairs.append((form.plain(x, s, key), _ops.sample_from_key(x, s, *options)))
        pairs.append((form.plain_backward(x, scale, key), _ops.sample_backward(x, scale, *options)))
        sampled, of_samples = form._replace(samples=3), key if key.dim() == 1 else key[None]
        options = (of_samples, name, None, None, bounds)
        z = _ops.sample_from_key(x, s, *options, 3)
        pairs.append((sampled.plain(x, s, of_samples), z))
        ours = sampled.plain_backward(z, scale, of_samples)
        pairs += zip(ours, _ops.samples_backward(z, scale, *options), strict=True)
    for ours, theirs in pairs:
        assert type(ours) is Tensor
        assert_same_bits(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("form", _forms.SAMPLE.values(), ids=_forms.SAMPLE)
def test_autograd_is_given_the_key_of_the_result(form: _forms.Call) -> None:
    mu = MU.clone().requires_grad_()
    for x, scale in ((mu, LOG_VAR), (LOG_VAR, mu)):
        z, key = form.plain_draw(x, scale, None)
        assert not z.requires_grad
        assert_same_bits(z, form.plain(x.detach(), scale.detach(), key))
        z, key = form.plain(x, scale, KEY)
        assert key is KEY
        with torch.no_grad():
            assert_same_bits(form.plain(x, scale, KEY), z)


@pytest.mark.parametrize("own", [False, True], ids=["default", "own"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_a_draw_is_one_step_of_the_generator(own: bool, grad: bool, both_paths: str) -> None:
    """64 bits, of which the key is made; and none for an empty result."""
    generator = torch.Generator() if own else torch.default_generator
    given = generator if own else None
    mu = MU.clone().requires_grad_(grad)
    for seed in range(5):
        generator.manual_seed(seed)
        z = fused_reparameterize(mu, LOG_VAR, generator=given)
        drawn = generator.get_state()
        generator.manual_seed(seed)
        word = torch.empty(1, dtype=torch.int64).random_(-(2**63), None, generator=given)
        assert torch.equal(generator.get_state(), drawn)
        key = key_of(int(word), 0)
        assert_same_bits(z.detach(), fused_reparameterize(MU, LOG_VAR, key=key))
        for empty in (MU[:0], MU[:, :0]):
            assert fused_reparameterize(empty, empty, generator=given).numel() == 0
        assert fused_reparameterize(MU[:0], LOG_VAR[:1], generator=given).numel() == 0
        assert torch.equal(generator.get_state(), drawn)


def test_large_calls_let_other_threads_of_python_run() -> None:
    """In the middle of the kernel: what comes before and after it is short."""
    program = """
import threading, time, torch, reparam_fused
from reparam_fused import _forms
torch.set_num_threads(1)
x, key = torch.zeros(1), reparam_fused.key(1)
launch, large = _forms.SAMPLE["std"].plain, x.expand(1 << 24)
times, done = [], threading.Event()
def note():
    while not done.is_set():
        times.append(time.perf_counter())
        time.sleep(0.0005)
threading.Thread(target=note).start()
for _ in range(20):
    start = time.perf_counter()
    launch(large, x, key)
    quarter = (time.perf_counter() - start) / 4
    if found := any(start + quarter < t < start + 3 * quarter for t in times):
        break
done.set()
print(found)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,  # in the root Python would import the source tree
        capture_output=True,
        text=True,
        timeout=patience(300),
        check=False,
    )
    assert result.stdout.strip() == "True", result.stderr
