"""torch's own operations on the stand-in GPU: on the host, in the order of the streams.

torch's kernels are machine code, which nothing here can run. Device memory is host memory, so an
operation's tensors are viewed as tensors of the CPU, and the CPU's operation does the work; when
it does is up to the stream that it was enqueued on. One wrapper serves the operations that are
listed here; whichever a test needs beyond them fails by name.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from .stand_in import StandIn

# By the names of their packets: every overload, in place or not, that has a kernel for CUDA. The
# shape, strides and dtype of what they give are those that they have on the meta device.
OPERATIONS = """
    abs acos add addbmm addcdiv addcmul addmm all amax amin aminmax any arange argmax argmin asin
    atan atan2 atanh baddbmm binary_cross_entropy binary_cross_entropy_backward bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm cat ceil clamp
    clamp_max clamp_min cos cumsum digamma div dot elu elu_backward eq erf erfinv exp expm1 eye fill
    flip floor floor_divide fmod gather ge gelu gelu_backward gt index index_add index_copy
    index_fill index_put index_select isfinite isinf isnan isneginf isposinf le lerp lgamma
    linalg_vector_norm linspace log log1p log2 log_sigmoid_backward log_sigmoid_forward logaddexp
    logspace logical_and logical_not logical_or logical_xor logsumexp lshift lt masked_fill
    masked_scatter max maximum
    mean min minimum mm mse_loss mse_loss_backward mul mv native_batch_norm native_layer_norm
    native_layer_norm_backward ne neg nextafter norm ones_like pow prod range reciprocal relu
    remainder repeat round rsqrt rsub scatter scatter_add sgn sigmoid sigmoid_backward sign signbit
    silu silu_backward sin softplus softplus_backward sort special_erfcx special_log_ndtr
    special_ndtr special_ndtri sqrt stack std sub sum tanh tanh_backward threshold
    threshold_backward topk trace tril triu trunc var where xlogy zero __lshift__ __rshift__ __and__
    __or__ __xor__ _log_softmax _log_softmax_backward_data _softmax _softmax_backward_data
    _foreach_add _foreach_addcdiv _foreach_addcmul _foreach_div _foreach_lerp _foreach_mul
    _foreach_norm _foreach_sqrt _foreach_sub _amp_foreach_non_finite_check_and_unscale
    _amp_update_scale _assert_async _convert_indices_from_coo_to_csr _index_put_impl _fused_adam
    _fused_adamw _thnn_fused_gru_cell
"""
# They look at values to know a shape, or to give a number: the host has to wait.
WAITING = """
    nonzero masked_select equal unique_consecutive _unique2 unique_dim bincount isin
    _local_scalar_dense histc
"""
RANDOM = "normal uniform random bernoulli exponential geometric cauchy log_normal"


@dataclass(frozen=True)
class Place:
    """Where a tensor of the device lies: all that work which runs later may keep of it."""

    pointer: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    conjugated: bool
    device: int


def _place(t: Tensor) -> Place:
    assert t.device.index is not None
    return Place(t.data_ptr(), t.shape, t.stride(), t.dtype, t.is_conj(), t.device.index)


def _call(op: Any, args: Any, kwargs: Any) -> Any:
    """The operation. A number where it takes a tensor, as in t & 1, is another overload's."""
    given = zip(op._schema.arguments, args, strict=False)
    if any(isinstance(a.type, torch.TensorType) and isinstance(v, (int, float)) for a, v in given):
        op = op.overloadpacket
    return op(*args, **kwargs)


class HostOps:
    """Registers the operations above for tensors of the stand-in's devices."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in
        self._library = torch.library.Library("aten", "IMPL")  # in force as long as it lives
        for names, make in ((OPERATIONS, self._operation), (WAITING, self._waiting)):
            for name in names.split():
                for packet in (name, f"{name}_"):
                    if hasattr(torch.ops.aten, packet):
                        self._register_all(getattr(torch.ops.aten, packet), make)
        for name in RANDOM.split():  # in place: torch's other forms end in these, but for one
            self._register_all(getattr(torch.ops.aten, f"{name}_"), self._random)
        for overload in ("Tensor_Tensor", "Tensor_float", "float_Tensor"):
            self._register(f"normal.{overload}", self._normal)
        self._register("copy_", self._copy)

    def _register_all(self, packet: Any, make: Callable[[Any], Callable[..., Any]]) -> None:
        for overload in packet.overloads():
            op = getattr(packet, overload)
            name = op.name()  # some are TorchScript's alone
            if torch._C._dispatch_has_kernel(name) and (
                torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
            ):
                self._register(op.name().removeprefix("aten::"), make(op))

    def _register(self, name: str, function: Callable[..., Any]) -> None:
        self._library.impl(name, function, "CUDA", allow_override=True)

    # A tensor of the CPU over the memory of one of the device

    def _flat(self, place: Place) -> Tensor:
        steps = sum((n - 1) * s for n, s in zip(place.shape, place.stride, strict=True))
        size = (steps + 1) * place.dtype.itemsize
        memory = (ctypes.c_uint8 * size).from_address(place.pointer)
        return torch.frombuffer(memory, dtype=torch.uint8, count=size)

    def _host(self, place: Place) -> Tensor:
        if 0 in place.shape:
            return torch.empty_strided(place.shape, place.stride, dtype=place.dtype)
        storage = self._flat(place).untyped_storage()
        empty = torch.empty(0, dtype=place.dtype)
        view = empty.set_(storage, 0, place.shape, place.stride)
        return view.conj() if place.conjugated else view

    def _written(self, place: Place) -> Tensor:
        """Whether each byte of the tensor was written, a row for each element."""
        library, width = self._stand_in.library, place.dtype.itemsize
        first = place.pointer - library.base
        steps = sum((n - 1) * s for n, s in zip(place.shape, place.stride, strict=True))
        bytes_ = torch.from_numpy(library.written_bytes[first : first + (steps + 1) * width])
        strides = [s * width for s in place.stride]
        return bytes_.as_strided([*place.shape, width], [*strides, 1])

    def _check(self, op: str, place: Place, *, read: bool) -> None:
        """The device's rules, which hold for torch's own kernels too."""
        if 0 in place.shape:
            return
        steps = sum((n - 1) * s for n, s in zip(place.shape, place.stride, strict=True))
        size = (steps + 1) * place.dtype.itemsize
        trouble = self._stand_in.library.trouble(place.pointer, size, -1).decode()
        if not trouble and read and not bool(self._written(place).all()):
            trouble = "reads bytes that nobody has written"
        if trouble:
            raise RuntimeError(f"{op}: {trouble}")

    def _mark(self, place: Place) -> None:
        if 0 not in place.shape:
            self._written(place).fill_(1)

    # The wrappers

    def _run(self, op: Any, arguments: Any, results: Any, written: list[Place]) -> None:
        """Do the operation on the host, now; `arguments` and `results` hold Places."""
        name = str(op)
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, Place) and leaf not in written:
                self._check(name, leaf, read=True)
        packet = op._schema.name
        changes = packet.endswith("_") and packet not in ("aten::fill_", "aten::zero_")
        for place in written:
            self._check(name, place, read=changes)
        on_host = tree_map(lambda x: self._host(x) if isinstance(x, Place) else x, arguments)
        given = _call(op, *on_host)
        for place in written:
            self._mark(place)
        if results is not None:
            places = tree_leaves(results)
            values = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
            for place, value in zip(places, values, strict=True):
                self._host(place).copy_(value)
                self._mark(place)

    def _device_of(self, values: Any) -> int:
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                return int(leaf.device.index)
        return torch.cuda.current_device()

    def _written_arguments(self, op: Any, args: Any, kwargs: Any) -> list[Tensor]:
        written: list[Tensor] = []
        for i, argument in enumerate(op._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
        return written

    def _operation(self, op: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            device = self._device_of((args, kwargs))
            written = self._written_arguments(op, args, kwargs)
            results = None
            if not written:
                results = self._results(op, args, kwargs, device)
            elif "out" in op._overloadname:
                self._resize(op, args, kwargs, written)
            places = tree_map(lambda t: _place(t) if self._on_device(t) else t, (args, kwargs))
            if "device" in places[1]:
                places[1]["device"] = torch.device("cpu")
            into = None if results is None else tree_map(
                lambda t: _place(t) if isinstance(t, Tensor) else t, results
            )  # fmt: skip
            marks = [_place(t) for t in written]
            self._stand_in.enqueue(str(op), device, lambda: self._run(op, places, into, marks))
            if not written:
                return results
            returned = op._schema.returns
            if not returned:
                return None
            return written[0] if len(returned) == 1 else tuple(written[: len(returned)])

        return call

    def _on_device(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_cuda

    def _meta(self, op: Any, args: Any, kwargs: Any) -> Any:
        def meta(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")

        args, kwargs = tree_map(meta, (args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        return _call(op, args, kwargs)

    def _results(self, op: Any, args: Any, kwargs: Any, device: int) -> Any:
        def empty(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return torch.empty_strided(
                t.shape, t.stride(), dtype=t.dtype, device=torch.device("cuda", device)
            )

        return tree_map(empty, self._meta(op, args, kwargs))

    def _resize(self, op: Any, args: Any, kwargs: Any, written: list[Tensor]) -> None:
        """Give tensors that are to hold results their shapes, as torch does."""
        given = self._meta(op, args, kwargs)
        for out, meta in zip(written, tree_leaves(given), strict=True):
            if out.shape != meta.shape:
                out.resize_(meta.shape)

    def _waiting(self, op: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            device = self._device_of((args, kwargs))
            torch.cuda.current_stream(device).synchronize()
            places = tree_map(lambda t: _place(t) if self._on_device(t) else t, (args, kwargs))
            for leaf in tree_leaves(places):
                if isinstance(leaf, Place):
                    self._check(str(op), leaf, read=True)
            args, kwargs = tree_map(
                lambda x: self._host(x) if isinstance(x, Place) else x, places
            )  # fmt: skip
            given = _call(op, args, kwargs)
            return tree_map(
                lambda t: t.to(torch.device("cuda", device)) if isinstance(t, Tensor) else t, given
            )

        return call

    def _random(self, op: Any) -> Callable[..., Any]:
        """Of the generator's seed and offset, which moves on as with torch's kernels: in fours."""

        def call(self_: Tensor, *args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
            device = int(self_.device.index)
            own = generator or torch.cuda.default_generators[device]
            offset = own.get_offset()  # refused in a capture
            own.set_offset(offset + 4 * -(-self_.numel() // 4))
            text = f"{own.initial_seed()} {offset}".encode()
            seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
            place = _place(self_)
            places = [_place(a) if self._on_device(a) else a for a in args]

            def work() -> None:
                self._check(str(op), place, read=False)
                for other in places:
                    if isinstance(other, Place):
                        self._check(str(op), other, read=True)
                fresh = torch.Generator().manual_seed(seed)
                given = [self._host(a) if isinstance(a, Place) else a for a in places]
                op(self._host(place), *given, generator=fresh, **kwargs)
                self._mark(place)

            self._stand_in.enqueue(str(op), device, work)
            return self_

        return call

    def _normal(
        self, mean: Tensor | float, std: Tensor | float = 1.0, generator: Any = None
    ) -> Tensor:
        tensors = [t for t in (mean, std) if isinstance(t, Tensor)]
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        return tensors[0].new_empty(shape).normal_(generator=generator).mul_(std).add_(mean)

    def _copy(self, to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        """As torch copies: bytes where both lie alike, else with a kernel on the device."""
        if source.dtype != to.dtype or source.shape != to.shape:
            if not source.is_cuda:
                source = source.to(to.dtype)
            source = source.expand(to.shape)
        if to.numel() == 0:
            return to
        alike = (
            to.dtype == source.dtype
            and to.stride() == source.stride()
            and to.is_conj() == source.is_conj()
            and torch.ops.aten.is_non_overlapping_and_dense(to)
        )
        if to.is_cuda and source.is_cuda:
            self._copy_on_device(to, source, alike)
        elif alike:
            self._stand_in.memcpy(to, source, wait=not non_blocking)
        elif to.is_cuda:
            self._copy_on_device(to, source.contiguous().to(to.device, non_blocking=non_blocking))
        else:
            dense = torch.empty(to.shape, dtype=source.dtype, device=source.device)
            self._copy_on_device(dense, source)
            host = torch.empty(to.shape, dtype=source.dtype)
            self._stand_in.memcpy(host, dense, wait=True)
            to.copy_(host)
        return to

    def _copy_on_device(self, to: Tensor, source: Tensor, alike: bool = False) -> None:
        if alike:
            self._stand_in.memcpy(to, source, wait=False)
            return
        device = int(source.device.index)
        target, origin = _place(to), _place(source)

        def work() -> None:
            self._check("copy_", origin, read=True)
            self._check("copy_", target, read=False)
            self._host(target).copy_(self._host(origin))
            self._mark(target)

        self._stand_in.enqueue("aten.copy_.default", device, work)
