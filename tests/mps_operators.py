"""Whether code would run on Apple's MPS, seen from a CPU: no float64, no operator without an MPS kernel, no wait for the device.

Which operators have one is read from the list of the installed torch itself, `native_functions.yaml`, that its dispatcher is
generated from. `torch.nn.functional.scaled_dot_product_attention` has kernels of its own on a CPU; on MPS, where gradients are
recorded, it is made of other operators, so use it under `sdpa_kernel(SDPBackend.MATH)`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torchgen
from torch.utils._python_dispatch import TorchDispatchMode
from torchgen.gen import parse_native_yaml
from torchgen.model import DispatchKey

# Composite operators have no kernel: by the sources of torch 2.13 (ATen/native/), each of these makes a view or a new tensor,
# copies, or calls the operators named here and no others.
_COMPOSITES: dict[str, tuple[str, ...]] = {
    # TensorShape.cpp, TensorConversions.cpp: views
    **dict.fromkeys(["alias", "detach", "expand", "lift_fresh", "select.int", "slice.Tensor", "split.Tensor", "squeeze.dim"], ()),
    **dict.fromkeys(["t", "transpose.int", "unbind.int", "unsqueeze", "view.dtype", "_unsafe_view"], ()),
    # TensorFactories.cpp, TensorConversions.cpp, Copy.cpp: memory, filled or copied; TypeProperties.cpp: no tensor at all
    **dict.fromkeys(["ones", "ones_like", "zeros", "zeros_like", "scalar_tensor"], ("fill_.Scalar", "zero_")),
    **dict.fromkeys(["empty_like", "clone", "copy_", "_to_copy", "promote_types"], ()),
    "arange": ("arange.start_out",),
    # BinaryOps.cpp: the scalar becomes a tensor
    "add_.Scalar": ("add_.Tensor",),
    "bitwise_and.Scalar": ("bitwise_and.Tensor",),
    "div.Scalar": ("div.Tensor",),
    "mul.Scalar": ("mul.Tensor",),
    "remainder.Scalar": ("remainder.Tensor",),
    "rsub.Scalar": ("sub.Tensor",),
    # UnaryOps.cpp, Embedding.cpp, TensorShape.cpp, ReduceOps.cpp, SoftMax.cpp
    "abs": ("abs.out",),
    "mean": ("mean.dim",),
    "embedding": ("index_select",),
    "stack": ("cat",),
    "select_backward": ("zero_",),
    "sum": ("sum.dim_IntList",),
    "_safe_softmax": ("_softmax", "eq.Scalar", "all.dim", "where.self"),
}


@functools.cache
def _with_kernels() -> frozenset[str]:
    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    index = parsed.backend_indices[DispatchKey.MPS]
    by_name = {str(function.func.name): function for function in parsed.native_functions}

    def has_kernel(name: str) -> bool:
        # In-place and functional variants of a structured operator share the kernel of the one with `out`.
        out = by_name[name].structured_delegate
        return index.has_kernel(by_name[name]) or (out is not None and index.has_kernel(by_name[str(out)]))

    return frozenset(filter(has_kernel, by_name))


class MpsOperators(TorchDispatchMode):
    """Raises AssertionError at the first operator that MPS hasn't, float64 tensor, or value that the host reads."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        assert func.namespace == "aten", f"{func}: not one of torch's own operators"
        assert name != "_local_scalar_dense", "the host reads a value of the device"
        assert {name, *_COMPOSITES.get(name, ())} - _COMPOSITES.keys() <= _with_kernels(), f"{name}: has no MPS kernel"
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            assert not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), f"{name}: float64"
        self.seen.add(name)
        return result
