"""Which of a model's weights had their values looked at, so that a decision which followed from them is known as such.

Rewrites read numbers out of constants: the exponent of a power, a mask that proves to be causal, everything that is
folded.  While `ValueReads` is active, every call of torch on a tensor that lies in the memory of one of the model's is
noted, unless it only asks for shape or type or gives another view of the whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

METADATA: Final = frozenset(
    "__get__ __set__ __hash__ __len__ __format__ size dim ndimension numel nelement stride storage_offset data_ptr "
    "element_size is_floating_point is_complex is_contiguous is_signed is_conj is_neg untyped_storage requires_grad_ "
    "detach contiguous get_device is_tensor is_inference has_names names".split()
)
"""Functions that tell nothing about values, or give the same tensor again (which is then noted when it is used)."""


class ValueReads(TorchFunctionMode):  # type: ignore[misc, unused-ignore]  # torch's class is not typed in full
    """`with ValueReads(tensors) as reads:` notes in `reads.names` which of `tensors` were looked into."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._places = [
            (t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in tensors.items() if t.nbytes
        ]

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """Note the tensors among the arguments, then call."""
        if getattr(func, "__name__", "") not in METADATA:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor):
                    self._note(leaf)
        return func(*args, **(kwargs or {}))

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu" and tensor.nbytes:
            address = tensor.data_ptr()
            self.names |= {name for start, end, name in self._places if start <= address < end}


def digest_values(tensor: Tensor) -> str:
    """SHA-256 of a tensor's elements in row-major order."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
