"""Plain programs on a GPU, whose results are compared with the CPU's as bits.

python tests/gpu/programs.py                   a table, and 1 as exit status if a row fails
python tests/gpu/programs.py --small           without compilers, graphs and large tensors: for
                                               compute-sanitizer, or for the stand-in GPU
python tests/gpu/programs.py --every-log-var   all 2^32 float32 values of log_var, in each op

What `python -m reparam_fused check` compares with reference.py is not repeated here: this is what
a user writes first, and what takes a GPU to be done at all.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import reparam_fused
from reparam_fused import _ops, fused_kl_divergence, fused_reparameterize, noise, split
from reparam_fused.check.parts import assert_same_bits, inputs, key_of, require

GPU = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((), (0,), (1,), (8,), (128, 20), (1021,), (3, 0, 2), (1000003,))


def on_gpu(tensor: Tensor) -> Tensor:
    """On the GPU, laid out as it is here."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(GPU)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def with_gradients(mu: Tensor, log_var: Tensor, **options: object) -> list[Tensor]:
    """z, and the gradients for a gradient of z that is mu."""
    leaves = [t.detach().requires_grad_() for t in (mu, log_var)]
    z = fused_reparameterize(*leaves, **options)  # type: ignore[arg-type]
    return [z.detach(), *torch.autograd.grad(z, leaves, mu.detach().expand(z.shape).to(z.dtype))]


def raised() -> str:
    """Errors of the binding, in C++, arrive as exceptions."""
    x, wrong, messages = torch.zeros(4, 3, device=GPU), torch.tensor([1, 2], device=GPU), []
    for call in (
        lambda: _ops.sample_from_key(x, x, wrong),
        lambda: _ops.noise(key_of(1), [3], torch.int32),
        lambda: _ops.sample_backward(x, x, key_of(1, device=GPU), "std"),
    ):
        try:
            call()
        except Exception as error:
            messages.append(str(error))
    require(len(messages) == 3, f"only these errors: {messages}")
    return "3 errors"


def compare(actual: list[Tensor], expected: list[Tensor], what: str) -> int:
    for got, wanted in zip(actual, expected, strict=True):
        require(got.is_cuda and not wanted.is_cuda, f"{what}: not on their devices")
        assert_same_bits(got, wanted, what)
    return sum(t.numel() for t in actual)


def drawn(generator: torch.Generator | None) -> str:
    """Without a key: the position of the generator is the key that gives the CPU the same bits."""
    moved = generator if generator is not None else torch.cuda.default_generators[0]
    moved.manual_seed(3)
    count = 0
    for dtype in DTYPES:
        for shape in SHAPES:
            mu, log_var = inputs(*shape, dtype=dtype)
            key = key_of(3, moved.get_offset() // 4 + 2**63)
            got = with_gradients(on_gpu(mu), on_gpu(log_var), generator=generator)
            count += compare(got, with_gradients(mu, log_var, key=key), f"{dtype} {shape}")
    first, second = (fused_reparameterize(mu.to(GPU), log_var.to(GPU)) for _ in "ab")
    require(not torch.equal(first, second), "two calls with the same noise")
    return f"{count} elements of z and its gradients, {len(SHAPES)} shapes, {len(DTYPES)} dtypes"


def keyed() -> str:
    key, count = key_of(2**64 - 59, 2**32 - 3), 0
    for dtype in DTYPES:
        for shape in SHAPES:
            mu, log_var = inputs(*shape, dtype=dtype)
            expected = with_gradients(mu, log_var, key=key)
            got = with_gradients(on_gpu(mu), on_gpu(log_var), key=key.to(GPU))
            count += compare(got, expected, f"{dtype} {shape}")
    return f"{count} elements of z and its gradients, {len(SHAPES)} shapes, {len(DTYPES)} dtypes"


def layouts(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    x, log_var = inputs(3, 10, 7, 16, dtype=dtype)
    wide = inputs(66, 96, dtype=dtype)[0]
    yield ("chunk(2)", *wide.chunk(2, dim=1))
    yield ("column", wide, wide[:, :1])
    yield ("row", wide, wide[:1])
    yield ("transposed", wide.t(), wide.flip(0).t())
    yield ("one transposed", wide[:, :66].t(), wide[:, :66].contiguous())
    yield ("every other", wide[:, ::2], wide[:, 1::2])
    yield ("not aligned", wide.flatten()[1:], wide.flip(0).flatten()[1:])
    yield ("differently aligned", wide.flatten()[1:-2], wide.flatten()[3:])
    yield ("channels last", x.to(memory_format=torch.channels_last), log_var)
    yield ("permuted", x.permute(3, 1, 0, 2), log_var.permute(3, 1, 0, 2))
    yield ("one element", x[0, 0, 0, :1].expand(1025), log_var[0, 0, 0, 1].expand(1025))


def laid_out() -> str:
    """Views are read where they lie: z, both gradients, the divergence, with a std too."""
    key, count, names = key_of(11, 2**32 - 3), 0, set()
    for dtype in DTYPES:
        for name, mu, scale in layouts(dtype):
            there, what = (on_gpu(mu), on_gpu(scale)), f"{name}, {dtype}"
            z, z_there = (fused_reparameterize(*t, key=key.to(t[0].device)) for t in
                          ((mu, scale), there))  # fmt: skip
            require(z.stride() == z_there.stride(), f"{what}: {z_there.stride()}")
            of_std = (fused_reparameterize(t[0], std=t[1], key=key.to(t[0].device)) for t in
                      (there, (mu, scale)))  # fmt: skip
            count += compare(
                [z_there, next(of_std), fused_kl_divergence(*there),
                 _ops.sample_backward(*there, key.to(GPU)), _ops.kl_divergence_backward(*there)],
                [z, next(of_std), fused_kl_divergence(mu, scale),
                 _ops.sample_backward(mu, scale, key), _ops.kl_divergence_backward(mu, scale)],
                what,
            )  # fmt: skip
            names.add(name)
    return f"{count} elements, {len(names)} layouts"


def keys_and_blocks() -> str:
    """A key for each row, and blocks of a larger tensor."""
    count, key = 0, key_of(9, 2**64 - 1)
    for dtype in DTYPES:
        for rows, columns in ((128, 20), (64, 1024), (5, 33), (1, 7)):
            mu, log_var = inputs(rows, columns, dtype=dtype)
            keys = split(key, rows)
            got = fused_reparameterize(mu.to(GPU), log_var.to(GPU), key=split(key.to(GPU), rows))
            count += compare([got], [fused_reparameterize(mu, log_var, key=keys)], "keys")
        whole = noise(key, 90, 400, dtype=dtype)
        for offset, shape in (((20, 80), (30, 160)), ((1, 3), (55, 177)), ((89, 399), (1, 1))):
            block = noise(
                key.to(GPU), *shape, dtype=dtype, global_shape=(90, 400), global_offset=offset
            )
            rows_, columns_ = (slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            count += compare([block], [whole[rows_, columns_]], "block")
    return f"{count} elements"


def posterior() -> str:
    """A Gaussian posterior trained for some steps, where our ops alone are in the path."""

    def train(device: torch.device) -> list[Tensor]:
        mu, log_var = (t.to(device).requires_grad_() for t in inputs(128, 20))
        target, key = inputs(128, 20, seed=1)[0].to(device), reparam_fused.key(7, device=device)
        seen = []
        for step in range(20):
            z = fused_reparameterize(mu, log_var, key=reparam_fused.fold_in(key, step))
            kl = fused_kl_divergence(mu, log_var)
            grads = torch.autograd.grad((z, kl), (mu, log_var), (z.detach() - target, kl.detach()))
            with torch.no_grad():
                for parameter, gradient in zip((mu, log_var), grads, strict=True):
                    parameter -= gradient * 0.0625
            seen += [z.detach(), kl.detach(), *grads]
        return [*seen, mu.detach(), log_var.detach()]

    return f"{compare(train(GPU), train(torch.device('cpu')), 'training')} elements in 20 steps"


def vae() -> str:
    """A VAE on noise-like data, keyless: its loss falls, and a second run is the first again."""

    def losses() -> list[float]:
        torch.manual_seed(0)
        encoder, decoder = torch.nn.Linear(64, 40).to(GPU), torch.nn.Linear(20, 64).to(GPU)
        data = torch.randn(256, 8, device=GPU) @ torch.randn(8, 64, device=GPU)
        adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
        seen = []
        for _ in range(200):
            mu, log_var = encoder(data).chunk(2, dim=1)
            loss = (decoder(fused_reparameterize(mu, log_var)) - data).square().sum(1).mean()
            loss = loss + fused_kl_divergence(mu, log_var).sum(1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            seen.append(loss.item())
        return seen

    first, second = losses(), losses()
    require(first == second, "another run from the same seed had other losses")
    require(first[-1] < first[0] / 4, f"the loss went from {first[0]} to {first[-1]}")
    return f"200 steps, loss {first[0]:.0f} to {first[-1]:.1f}, twice the same"


def patched() -> str:
    mean, std = torch.zeros(1000, device=GPU), torch.ones(1000, device=GPU)
    with reparam_fused.patch("normal"):
        torch.cuda.manual_seed(5)
        z = torch.distributions.Normal(mean, std).rsample()
    torch.cuda.manual_seed(5)
    assert_same_bits(z, fused_reparameterize(mean, std=std))
    return "Normal.rsample is the fused call"


def autocast() -> str:
    mu, log_var = (t.to(GPU) for t in inputs(64, dtype=torch.bfloat16))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        eager = mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)
        z = fused_reparameterize(mu, log_var)
    require(z.dtype == eager.dtype, f"{z.dtype} instead of {eager.dtype}")
    return f"{z.dtype}, as the eager line"


def compiled() -> str:
    """torch.compile by inductor, on the GPU: keyed bits, fresh noise, the gradient of that z."""
    call = torch.compile(fused_reparameterize, fullgraph=True)
    key, count = key_of(5), 0
    for dtype in DTYPES:
        mu, log_var = inputs(128, 20, dtype=dtype)
        got = []
        for options in ({"key": key.to(GPU)}, {}, {}):
            leaves = [t.to(GPU).requires_grad_() for t in (mu, log_var)]
            z = call(*leaves, **options)
            got.append([z.detach(), *torch.autograd.grad(z, leaves, torch.ones_like(z))])
        leaves = [t.clone().requires_grad_() for t in (mu, log_var)]
        z = fused_reparameterize(*leaves, key=key)
        expected = [z.detach(), *torch.autograd.grad(z, leaves, torch.ones_like(z))]
        count += compare(got[0], expected, f"with a key, {dtype}")
        require(not torch.equal(got[1][0], got[2][0]), "two compiled calls with the same noise")
        if dtype == torch.float32:
            for z, _, grad in got[1:]:  # 2 dz/dlog_var = sigma eps, and z = mu + sigma eps
                torch.testing.assert_close(2 * grad, z - mu.to(GPU), rtol=0, atol=4e-6)
    return f"{count} elements with a key, fresh noise without"


def replayed() -> str:
    """A captured step without a key, and a key's in the same graph."""
    mu, log_var = (t.to(GPU) for t in inputs(100003))
    key, graph = key_of(5, device=GPU), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fresh, fixed = fused_reparameterize(mu, log_var), fused_reparameterize(mu, log_var, key=key)
    torch.cuda.synchronize()  # torch writes the graph's state on the stream of the capture
    torch.cuda.manual_seed(5)
    replays = []
    for _ in range(3):
        graph.replay()
        replays.append((fresh.clone(), fixed.clone()))
    torch.cuda.manual_seed(5)
    for drawn, named in replays:
        assert_same_bits(drawn, fused_reparameterize(mu, log_var))
        assert_same_bits(named, fused_reparameterize(mu.cpu(), log_var.cpu(), key=key.cpu()))
    require(not torch.equal(replays[0][0], replays[1][0]), "two replays with the same noise")
    return "3 replays have the noise of 3 eager calls"


def large() -> str:
    """2^26 elements of random values in every op: what no interpreter gets through."""
    torch.manual_seed(1)
    wide, count, key = torch.randn(2, 2**26 + 5), 0, key_of(77, 2**64 - 12345)
    for dtype in DTYPES:
        mu, log_var = (2 * wide).to(dtype)
        there = mu.to(GPU), log_var.to(GPU)
        for op in ("sample_from_key", "sample_backward", "kl_divergence", "kl_divergence_backward"):
            keys = [] if "kl" in op else [key]
            got = getattr(_ops, op)(*there, *(k.to(GPU) for k in keys))
            count += compare([got], [getattr(_ops, op)(mu, log_var, *keys)], f"{op}, {dtype}")
    return f"{count} elements"


def every_log_var(op: str, part: int = 2**27, first: int = -(2**31)) -> str:
    """All float32 patterns from the first on as log_var, in parts; each with noise of its own."""
    keys = [] if "kl" in op else [key_of(2026)]

    def run(device: torch.device, start: int) -> Tensor:
        patterns = torch.arange(start, start + part, dtype=torch.int32, device=device)
        log_var = patterns.view(torch.float32)
        noise_of = [*(k.to(device) for k in keys), "log_var", (2**32,), (start + 2**31,)]
        x = torch.full_like(log_var, 0.75)
        result: Tensor = getattr(_ops, op)(x, log_var, *(noise_of if keys else ()))
        return result

    for start in range(first, 2**31, part):
        got, wanted = run(GPU, start), run(torch.device("cpu"), start).to(GPU)
        same = got.view(torch.int32) == wanted.view(torch.int32)
        same |= got.isnan() & wanted.isnan()
        require(bool(same.all()), f"{int((~same).sum())} differ of those from {start} on")
    return f"{2**31 - first} elements"


SMALL: dict[str, Callable[[], str]] = {
    "default generator": lambda: drawn(None),
    "own generator": lambda: drawn(torch.Generator(GPU)),
    "key": keyed,
    "layouts": laid_out,
    "keys and blocks": keys_and_blocks,
    "Gaussian posterior": posterior,
    "patched Normal": patched,
    "autocast": autocast,
    "errors": raised,
}
OTHERS: dict[str, Callable[[], str]] = {
    "VAE": vae,
    "torch.compile": compiled,
    "CUDA graph": replayed,
    "2^26 elements": large,
}
EVERY: dict[str, Callable[[], str]] = {
    f"every log_var, {op}": lambda op=op: every_log_var(op)  # type: ignore[misc]
    for op in ("sample_from_key", "sample_backward", "kl_divergence", "kl_divergence_backward")
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--every-log-var", action="store_true")
    arguments = parser.parse_args()
    torch.cuda.init()
    rows = EVERY if arguments.every_log_var else SMALL if arguments.small else SMALL | OTHERS
    failed = 0
    for name, row in rows.items():
        start = time.perf_counter()
        try:
            status, detail = "pass", row()
            torch.cuda.synchronize()
        except Exception as error:
            status, detail = "FAIL", f"{type(error).__name__}: {error}"
            traceback.print_exc()
            failed += 1
        print(f"{status}  {name:36}  {time.perf_counter() - start:6.1f} s  {detail}", flush=True)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
