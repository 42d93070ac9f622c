"""A plan as JSON and back, exactly: the C++ printed from it is the same, byte for byte.

The whole kernel IR goes along, terms with their sharing; kernels that several launches share are stored once.
Constants are stored by the names that the source model has for them, never by value: the plan that comes back reads
the tensors that the model has now.  A plan with an eager step (which holds code) or with a constant that is no tensor
of the model (one that was folded) has no such form: NotStorable says which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

from torchweld.codegen.cache import JsonValue
from torchweld.codegen.ir import Buffer, Kernel, Part, part_binds, part_terms
from torchweld.codegen.plan import Launch, Plan, PlanError
from torchweld.codegen.record_json import DamagedRecord, NotStorable, record_from_json, record_to_json
from torchweld.graph.formats import FORMATS
from torchweld.graph.terms import (
    OPS,
    Attend,
    Const,
    Contract,
    Decode,
    Fold,
    Guard,
    IndexValue,
    Load,
    Op,
    Ref,
    Term,
    children,
    walk,
)

SHARED: Final = (Const, IndexValue, Load, Decode, Op, Guard, Fold, Contract, Attend, Ref, Kernel)
"""What is shared by identity in a plan."""


def plan_to_json(plan: Plan, tensor_name: Callable[[Tensor], str]) -> JsonValue:
    """`plan` as JSON.  Raises NotStorable; so does `tensor_name` for a tensor that is none of the model's."""
    return record_to_json(plan, Plan, SHARED, tensor_name)


def plan_from_json(data: JsonValue, tensors: Mapping[str, Tensor]) -> Plan:
    """The plan, over the model's tensors by name.  Raises DamagedRecord for what is no whole, consistent plan."""
    plan = record_from_json(data, Plan, SHARED, tensors)
    check_stored_plan(plan)
    return plan


def name_tensors(tensors: Mapping[str, Tensor]) -> Callable[[Tensor], str]:
    """A function from a tensor to the name of the one of `tensors` that is the same memory, seen the same way.

    It raises NotStorable for a tensor that is none of them.
    """
    names: dict[tuple[object, ...], str] = {
        _view(tensor): name for name, tensor in reversed(list(tensors.items()))
    }

    def tensor_name(tensor: Tensor) -> str:
        name = names.get(_view(tensor))
        if name is None:
            raise NotStorable(
                f"a constant {tensor.dtype} of shape {tuple(tensor.shape)} is no tensor of the model"
            )
        return name

    return tensor_name


def _view(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def check_stored_plan(plan: Plan) -> None:
    """Raise DamagedRecord unless every launch fits its kernel and its values, and every kernel its buffers."""
    try:
        plan.check()
    except PlanError as problem:
        raise DamagedRecord(str(problem)) from problem
    for launch in plan.launches():
        _check_arguments(plan, launch)
    for kernel in {id(launch.kernel): launch.kernel for launch in plan.launches()}.values():
        buffers = {buffer.name: buffer for buffer in kernel.buffers}
        roots = [indirect.term for indirect in kernel.indirects]
        _check_terms(kernel.name, [term for root in roots for term in walk(root)], buffers, frozenset())
        for part in kernel.parts:
            _check_part(kernel.name, part, buffers)


def _check_arguments(plan: Plan, launch: Launch) -> None:
    """Every argument has the dtype and the rank of its buffer, a constant its very shape."""
    specs = {spec.name: spec for spec in plan.inputs} | dict(plan.values)
    for buffer, name in zip(launch.kernel.buffers, launch.arguments, strict=True):
        constant = plan.constants.get(name)
        fits = (
            constant.dtype == buffer.dtype and tuple(constant.shape) == buffer.shape
            if constant is not None
            else specs[name].dtype == buffer.dtype and len(specs[name].shape) == len(buffer.shape)
        )
        if not fits:
            raise DamagedRecord(f"kernel {launch.kernel.name}: {name} does not fit buffer {buffer.name}")


def _check_part(kernel: str, part: Part, buffers: Mapping[str, Buffer]) -> None:
    bound = frozenset(bind.name for bind in part_binds(part))
    _check_terms(kernel, list(part_terms(part)), buffers, bound)
    for store in part.stores:
        buffer = buffers.get(store.buffer)
        if buffer is None or not buffer.is_written or len(buffer.shape) != len(store.index):
            raise DamagedRecord(f"kernel {kernel}: a store to {store.buffer} fits no output")


def _check_terms(
    kernel: str, terms: list[Term], buffers: Mapping[str, Buffer], bound: frozenset[str]
) -> None:
    for term in terms:
        match term:
            case Op():
                fits = OPS.get(term.name) == len(children(term))
            case Load():
                fits = term.buffer in buffers and len(buffers[term.buffer].shape) == len(term.index)
            case Decode():
                rank = len(term.row) + 1
                fits = (
                    term.format in FORMATS
                    and term.buffer in buffers
                    and len(buffers[term.buffer].shape) == rank
                )
            case Ref():
                fits = term.name in bound
            case _:
                fits = True
        if not fits:
            raise DamagedRecord(f"kernel {kernel}: {term} does not fit its operands")
