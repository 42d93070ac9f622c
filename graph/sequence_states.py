"""Convolutions, which may look back along the sequence as attention does: those that are causal.

    read_convolution(node)       # Convolution(source, ...): result t reads inputs up to t; or why not
    STATE_RULES                  # their rules for `sequence.walk_sequence`

A convolution is causal by its sizes alone: (K - 1) * dilation zeros in front of the input, as many results as inputs.
In front they come by an explicit pad, or by symmetric padding whose last results a slice cuts off. What is carried:
the last (K - 1) * dilation inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from torchweld.graph.match import (
    argument,
    aten,
    axis_argument,
    is_call,
    is_tensor,
    rank_of,
    shape_of,
)
from torchweld.graph.ops import causal_convolution as convolution_op
from torchweld.graph.rewrite import Refusal
from torchweld.graph.sequence import Along, Mixes, Rule, Scope, op_name

CONVOLUTION: Final = torch.ops.torchweld.causal_convolution.default
CONVOLUTIONS: Final = (aten.conv1d.default, aten.conv1d.padding, aten.convolution.default)
PADS: Final = (aten.pad.default, aten.constant_pad_nd.default)
# Importing it is what registers the op.
OPERATOR_FILES: Final = (convolution_op.__name__,)


@dataclass(frozen=True)
class Convolution:
    """result[..., t] = sum over i of weight[..., i] * source[..., t - (K - 1 - i) * dilation], zeros in front.

    order: the source is read with its axes in this order; None for as it is.
    """

    source: fx.Node
    order: list[int] | None
    weight: fx.Node
    bias: fx.Node | None
    dilation: int
    groups: int


def read_convolution(node: fx.Node) -> Convolution | Refusal | None:
    """The causal convolution that `node` is the result of: a conv1d, or the slice that cuts one; None for neither."""
    call = node
    if is_call(node, aten.slice.Tensor):
        call = node.args[0]  # type: ignore[assignment]
        first = argument(node, 2, "start") in (None, 0) and argument(node, 4, "step", 1) == 1
        if not is_call(call, *CONVOLUTIONS) or axis_argument(node, 1, "dim", 3) != 2 or not first:
            return None
    if not is_call(call, *CONVOLUTIONS) or rank_of(call) != 3:
        return None
    return _read(call, shape_of(node)[2])


def _read(call: fx.Node, length: Any) -> Convolution | Refusal:
    """The convolution `call`, of which the first `length` results are read."""
    settings = _settings(call)
    if isinstance(settings, Refusal):
        return settings
    padding, dilation, groups = settings
    read, weight, bias = call.args[0], call.args[1], argument(call, 2, "bias")
    source, order, front = _without_pad(read)  # type: ignore[arg-type]
    if not is_tensor(weight) or not (bias is None or is_tensor(bias)):
        return Refusal("the weight of this convolution is no tensor", call)
    taps = int(shape_of(weight)[2])  # type: ignore[arg-type]
    ahead = (taps - 1) * dilation - front - padding
    if ahead > 0:
        reason = f"the convolution looks {_count(ahead)} ahead: a kernel of {taps}"
        reason += f" with dilation {dilation}" if dilation > 1 else ""
        reason += f" and {front + padding} zeros in front of the first position"
        return Refusal(reason, call)
    if ahead < 0:
        return Refusal(f"the convolution is {_count(-ahead)} behind its input, which has no state rule", call)
    place = 2 if order is None else order[2]
    if shape_of(source)[place] != length:
        reason = "the convolution has more results than inputs: those behind the last input are not cut off"
        return Refusal(reason, call)
    return Convolution(source, order, weight, bias, dilation, groups)  # type: ignore[arg-type]


def _settings(call: fx.Node) -> tuple[int, int, int] | Refusal:
    """(zeros in front, dilation, groups) of a convolution of one stride."""
    stride, padding = _number(call, 3, "stride", 1), argument(call, 4, "padding", 0)
    dilation = _number(call, 5, "dilation", 1)
    turned = call.target is aten.convolution.default and bool(argument(call, 6, "transposed", False))
    groups = argument(call, 8 if call.target is aten.convolution.default else 6, "groups", 1)
    if stride != 1 or turned:
        what = "transposed" if turned else f"of stride {stride}"
        return Refusal(f"a convolution {what}: its result t does not belong to position t", call)
    if padding == "valid":
        front = 0
    elif padding == "same":
        front = (int(shape_of(call.args[1])[2]) - 1) * dilation // 2  # type: ignore[arg-type]
    else:
        front = padding if isinstance(padding, int) else padding[0] if padding else 0
    if not all(isinstance(number, int) for number in (front, dilation, groups)):
        return Refusal("the padding, dilation or groups of this convolution vary", call)
    return front, dilation, groups


def _number(call: fx.Node, position: int, name: str, default: int) -> Any:
    """An argument that is a number, or a list of one."""
    given = argument(call, position, name, default)
    return given if isinstance(given, (int, fx.Node)) else given[0] if given else default


def _without_pad(read: fx.Node) -> tuple[fx.Node, list[int] | None, int]:
    """(x, order, zeros): what `read` is, with its axes in `order`, behind so many zeros on the last axis."""
    order: Any = None
    inner = read
    if is_call(read, aten.permute.default):
        order = [axis % 3 for axis in read.args[1]]  # type: ignore[operator,union-attr]
        inner = read.args[0]  # type: ignore[assignment]
    axis = 2 if order is None else order[2]
    front = _zeros_in_front(inner, axis)
    if front is None:
        return read, None, 0
    return inner.args[0], order, front  # type: ignore[return-value]


def _zeros_in_front(node: fx.Node, axis: int) -> int | None:
    """How many zeros a pad puts in front of `axis` alone, behind which it puts none; None for anything else."""
    if not is_call(node, *PADS) or not is_tensor(node.args[0]) or rank_of(node) != 3:
        return None
    sizes: Any = node.args[1]
    by_name = node.target is aten.pad.default
    if by_name and argument(node, 2, "mode", "constant") != "constant":
        return None
    if argument(node, 3 if by_name else 2, "value", None) not in (None, 0, False):
        return None
    if not all(isinstance(size, int) for size in sizes):
        return None
    place = 2 * (2 - axis)
    front = sizes[place] if place < len(sizes) else 0
    others = [size for number, size in enumerate(sizes) if number != place]
    return front if front >= 0 and not any(others) else None


def _count(positions: int) -> str:
    return f"{positions} position" if positions == 1 else f"{positions} positions"


def _convolution(scope: Scope, node: fx.Node) -> Along:
    """A convolution over the sequence carries its last inputs; over another axis it is local."""
    source, along = _source(scope, node)
    if along.axis == 1:
        raise Mixes(f"{op_name(node)} sums over the sequence axis: a later token changes earlier outputs")
    if along.axis == 0 or shape_of(node.args[1])[2] == 1:  # type: ignore[arg-type]
        return along
    if not scope.is_whole(source, 2):
        raise Mixes(f"{op_name(node)} reads across sequences")
    scope.carried.append(node)
    return Along(2, tokens=True)


def _other_convolution(scope: Scope, node: fx.Node) -> Along:
    """A convolution that is not causal, unless the sequence is its batch."""
    _, along = _source(scope, node)
    if along.axis == 0:
        return along
    found = read_convolution(node)
    if isinstance(found, Refusal):
        raise Mixes(found.reason)
    raise Mixes(f"{op_name(node)} sums over the sequence axis: a later token changes earlier outputs")


def _pad(scope: Scope, node: fx.Node) -> Along:
    """Columns around other axes change nothing; around the sequence only a causal convolution may have them."""
    source, along = _source(scope, node)
    sizes: Any = node.args[1]
    place = 2 * (rank_of(source) - 1 - along.axis)
    if not any(size != 0 for size in sizes[place : place + 2]):
        return along
    for user in _convolutions_of(node):
        for result in (user, *user.users):
            found = read_convolution(result)
            if isinstance(found, Refusal):
                raise Mixes(found.reason, user)
    raise Mixes(f"{op_name(node)} puts other values in front of or behind the positions of the sequence")


def _convolutions_of(node: fx.Node) -> list[fx.Node]:
    """Convolutions that read a node, or its transpose."""
    readers = [user for user in node.users if is_call(user, *CONVOLUTIONS)]
    for user in node.users:
        if is_call(user, aten.permute.default):
            readers += [reader for reader in user.users if is_call(reader, *CONVOLUTIONS)]
    return readers


def _source(scope: Scope, node: fx.Node) -> tuple[fx.Node, Along]:
    """The first operand, which has the sequence; Mixes where another operand has it too."""
    source: Any = node.args[0]
    along = scope.of(source)
    if along is None or any(
        scope.of(other) is not None for other in node.all_input_nodes if other is not source
    ):
        raise Mixes(f"{op_name(node)} has weights or bounds that depend on the sequence")
    return source, along


STATE_RULES: Final[dict[Any, Rule]] = {
    CONVOLUTION: Rule(_convolution),
    **dict.fromkeys(CONVOLUTIONS, Rule(_other_convolution)),
    **dict.fromkeys(PADS, Rule(_pad)),
}
"""What these ops do to the sequence axis."""
