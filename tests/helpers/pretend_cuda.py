"""An accelerator that is not there: tensors that say `cuda` and compute on the CPU, and what a real one would refuse.

Inside `rehearsal()` every tensor that is asked for on `cuda` has this form. Numbers are those of the CPU, so a pass
ends as it does there; an operation that mixes tensors of both devices raises, as CUDA does. What makes the host wait
until the accelerator has caught up (`.item()`, `.cpu()`, shapes that depend on values) is counted, by the line of the
package that asked for it. PyTorch's FakeTensorMode, which has no values, cannot go on behind the first of these.

For C++ these tensors lie on `meta`: builds without CUDA have nothing to guard a CUDA device with. So what C++ makes on
the way, as numbers that stand among tensors, would have no values: such functions run as a whole (`_WHOLE`).
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import tenp_dist

CUDA = torch.device("cuda", 0)
WAITS: Counter[str] = Counter()
_PACKAGE = str(Path(tenp_dist.__file__).parent)
_WHOLE = {F.scaled_dot_product_attention, torch.where, torch.Tensor.where, torch.Tensor.__setitem__}
_MOVES = {"copy_", "_copy_from", "_to_copy"}
_TO_HOST = {"_local_scalar_dense", "equal", "is_nonzero"}
_SHAPED_BY_VALUES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
_BY_PLACES = {"index", "index_put", "index_put_", "_index_put_impl_", "__getitem__", "__setitem__"}


class MixedDevices(RuntimeError):
    """An operation got tensors of the host and of the accelerator."""


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on the accelerator. inner: where it does."""

    inner: torch.Tensor
    is_cuda, is_cpu, is_meta = True, False, False

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnCuda:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("meta"),
        )
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnCuda({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._opname
        _check(name, args, kwargs)
        target = kwargs.pop("device", None)
        leaves = target is not None and torch.device(target).type == "cpu"
        copied_back = name == "copy_" and not isinstance(args[0], OnCuda)
        if leaves or copied_back or name in _TO_HOST | _SHAPED_BY_VALUES or _has_mask(name, args):
            _note_wait()
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        outer = {id(one.inner): one for one in tree_leaves((args, kwargs)) if isinstance(one, OnCuda)}
        found = func(*_inner(args), **_inner(kwargs))
        if leaves or name in _MOVES - {"_to_copy"}:
            return found if leaves else args[0]
        return tree_map_only(torch.Tensor, lambda one: outer[id(one)] if id(one) in outer else OnCuda(one), found)


class _Placing(TorchFunctionMode):
    """Takes what is asked for on `cuda` before torch looks for it there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        given = any(isinstance(one, OnCuda) for one in tree_leaves((args, kwargs)))
        if given and name == "tolist":
            _note_wait()
            return args[0].inner.tolist()
        if given and (func in _WHOLE or (name == "__getitem__" and _has_list(args[1]))):
            _check(name, args, kwargs)
            if name == "__getitem__":
                _note_wait()
            return tree_map_only(torch.Tensor, OnCuda, func(*_inner(args), **_inner(kwargs)))
        if name == "to" and isinstance(args[0], torch.Tensor):
            copy = kwargs.pop("copy", False)
            device, dtype, *_ = torch._C._nn._parse_to(*_inner(args[1:]), **_inner(kwargs))
            kwargs |= {"copy": True} if copy else {}
            like = next((one for one in args[1:] if isinstance(one, torch.Tensor)), args[0])
            if (device is not None and device.type == "cuda") or (like is not args[0] and isinstance(like, OnCuda)):
                return _moved(args[0], dtype or like.dtype, copy=copy)
        elif not given and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            return tree_map_only(torch.Tensor, OnCuda, func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


def _check(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise MixedDevices where CUDA would; places may come from the host, which then waits."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    host = [one for one in tensors if not isinstance(one, OnCuda)]
    if name in _MOVES or not host or len(host) == len(tensors):
        return
    if any(one.is_meta for one in host):
        raise RuntimeError(f"{name}: a tensor was made in C++, where the pretence is not seen")
    if name in _BY_PLACES:
        places = [one for one in tree_leaves(args[1]) if any(one is other for other in host)]
        if places:
            _note_wait()
        host = [one for one in host if all(one is not place for place in places)]
    if wide := [one for one in host if one.dim()]:  # a single number may come from the host
        raise MixedDevices(f"{name} of the accelerator and of the host's {tuple(wide[0].shape)}, in {_who()}")


def _has_mask(name: str, args: tuple) -> bool:
    """Whether places are given by a mask, whose ones are counted first."""
    return name in _BY_PLACES and any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in args[1])


def _has_list(places: Any) -> bool:
    return any(isinstance(one, list) for one in (places if isinstance(places, tuple) else (places,)))


def _inner(tree: Any) -> Any:
    return tree_map_only(OnCuda, lambda one: one.inner, tree)


def _moved(tensor: torch.Tensor, dtype: torch.dtype, *, copy: bool) -> torch.Tensor:
    if isinstance(tensor, OnCuda):
        return tensor.to(dtype=dtype, copy=copy) if copy or tensor.dtype != dtype else tensor
    assert not tensor.is_meta, "a tensor without numbers goes to the accelerator"
    return OnCuda(tensor.detach().to(dtype=dtype, copy=True))


def _note_wait() -> None:
    WAITS[_who()] += 1


def _who() -> str:
    """File and function of the package that are at work."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return f"{Path(frame.f_code.co_filename).relative_to(_PACKAGE)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


@contextlib.contextmanager
def rehearsal(monkeypatch) -> Iterator[Counter[str]]:
    """Inside, there is an accelerator, on threads of passes too. Who made the host wait -> how often, inside."""
    from tenp_dist.passes import compute, layer_loader, layer_worker

    real = compute.side_thread

    def side_thread(name: str):
        executor = real(name)
        executor.submit(_Placing().__enter__).result()
        return executor

    WAITS.clear()
    with monkeypatch.context() as patch, _Placing():
        patch.setattr(torch, "inference_mode", torch.no_grad)  # whose tensors no module takes as parameters
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        for module in (compute, layer_loader, layer_worker):
            patch.setattr(module, "side_thread", side_thread)
        yield WAITS
