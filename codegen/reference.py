"""A group's sub-graph as plain torch source: what a dumped kernel is compared with.

The text stands alone: it imports nothing but torch.  Operations of our own are replaced by the source of their eager
reference, stored formats by a decode in torch written from the same terms that the kernel printers read.  Sizes that
the graph computes are written as expressions of the size arguments.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from torchweld.codegen.lower import LoweredGroup
from torchweld.codegen.pieces import APPEND
from torchweld.codegen.triton_text import SPELLINGS, Names, Value, index_text, literal
from torchweld.graph.formats import get_format
from torchweld.graph.formats.terms import decode_terms
from torchweld.graph.groups import Group
from torchweld.graph.meaning.context import size_expr
from torchweld.graph.ops.attention import attention_reference, positional_visibility
from torchweld.graph.ops.cached_attention import (
    _ancestors,
    append_rows_reference,
    cached_attention_reference,
)
from torchweld.graph.ops.cached_rows import _slots, cached_rows_reference
from torchweld.graph.ops.rope import rope_reference, rotate
from torchweld.graph.partition import extract_group
from torchweld.graph.terms import Const, Expr, IndexValue, Op, Term

_INLINED: Mapping[str, tuple[str, tuple[Callable[..., object], ...]]] = {
    "attention": ("attention_reference", (positional_visibility, attention_reference)),
    "append_rows": ("append_rows_reference", (append_rows_reference,)),
    "cached_attention": (
        "cached_attention_reference",
        (positional_visibility, attention_reference, _ancestors, cached_attention_reference),
    ),
    "cached_rows": ("cached_rows_reference", (_slots, cached_rows_reference)),
    "rope": ("rope_reference", (rotate, rope_reference)),
}
_SYMBOLS = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
}


@dataclass(frozen=True)
class Signature:
    """The parameters of a printed reference: tensors by placeholder name, then sizes.

    tensors: placeholder name -> parameter name.  A tensor placeholder that is not listed is read for its shape only
    and becomes an empty tensor.
    """

    tensors: Mapping[str, str]
    sizes: tuple[str, ...]


def group_reference(group: Group, lowered: LoweredGroup, name: str = "reference") -> str:
    """`reference(inputs..., sizes...) -> outputs` of a lowered group, its parameters named as the kernel's buffers."""
    buffers = [b.name for b in lowered.kernel.buffers if b.role != "output"]
    read = [group.inputs[position].name for position in lowered.input_positions]
    # An update is given by the tensor that it was before.
    read += [str(node.args[0]) for node in group.outputs if node.target is APPEND]
    signature = Signature(dict(zip(read, buffers, strict=True)), lowered.kernel.sizes)
    return reference_source(extract_group(group).module, name, signature)


def reference_source(gm: fx.GraphModule, name: str = "reference", signature: Signature | None = None) -> str:
    """Python source of `name(tensors..., sizes...)` that computes what `gm` does, with everything it calls before it.

    Raises NotImplementedError for a node that is neither an ATen operation, one of ours, nor arithmetic on sizes.
    """
    if signature is None:
        signature = _own_signature(gm)
    printer = _Printer(gm, signature)
    lines = printer.body()
    parameters = ", ".join([*signature.tensors.values(), *signature.sizes])
    function = "\n".join([f"def {name}({parameters}):", *(f"    {line}" for line in lines)])
    aten = ["aten = torch.ops.aten"] if "aten." in function else []
    return "\n\n\n".join([*aten, *printer.inlined.values(), function]) + "\n"


def _own_signature(gm: fx.GraphModule) -> Signature:
    """Every tensor placeholder and weight under its own name, then the size symbols of the inputs."""
    nodes = [n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    tensors = [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    symbols = {str(s) for n in nodes for e in _extents(n) for s in e.free_symbols}
    return Signature({n.name: n.name for n in tensors}, tuple(sorted(symbols)))


def _extents(node: fx.Node) -> list[Expr]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [size_expr(extent) for extent in value.shape]
    return [size_expr(value)] if isinstance(value, torch.SymInt | int) else []


@dataclass
class _Printer:
    """One function body; `inlined` collects the sources that it calls, by name."""

    gm: fx.GraphModule
    signature: Signature
    texts: dict[fx.Node, str] = field(default_factory=dict)
    inlined: dict[str, str] = field(default_factory=dict)
    names: Names = field(default_factory=lambda: Names({"torch", "aten", "float"}))

    def body(self) -> list[str]:
        """The statements."""
        self.names.used |= {*self.signature.tensors.values(), *self.signature.sizes}
        lines: list[str] = []
        for node in self.gm.graph.nodes:
            if node.op == "output":
                results = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
                texts = [self.argument(result) for result in results]
                lines.append(f"return {', '.join(texts)}{',' if len(texts) == 1 else ''}")
            elif node.name in self.signature.tensors:
                self.texts[node] = self.signature.tensors[node.name]
            elif isinstance(node.meta.get("val"), torch.SymInt | int):
                self.texts[node] = f"({_size_text(size_expr(node.meta['val']))})"
            else:
                self.texts[node] = self.names.fresh(node.name)
                lines.append(f"{self.texts[node]} = {self.statement(node)}")
        return lines

    def statement(self, node: fx.Node) -> str:
        """The right-hand side of one node."""
        if node.op in ("placeholder", "get_attr"):
            value = node.meta["val"]
            shape = ", ".join(_size_text(size_expr(extent)) for extent in value.shape)
            return f"torch.empty([{shape}], dtype={value.dtype}, device={self.device()})"
        if node.target is operator.getitem:
            return f"{self.argument(node.args[0])}[{self.argument(node.args[1])}]"
        if node.target in _SYMBOLS:
            left, right = (self.argument(a) for a in node.args)
            return f"{left} {_SYMBOLS[node.target]} {right}"
        if not isinstance(node.target, torch._ops.OpOverload):
            raise NotImplementedError(
                f"reference: node {node.name} calls {node.target}, expected an operation"
            )
        arguments = [self.argument(a) for a in node.args]
        arguments += [f"{key}={self.argument(value)}" for key, value in node.kwargs.items()]
        return f"{self.callee(node)}({', '.join(arguments)})"

    def callee(self, node: fx.Node) -> str:
        """The function of a node: an ATen overload, or a reference that is inlined."""
        namespace, name = str(node.target).split(".")[0], str(node.target).split(".")[1]
        if namespace == "aten":
            return str(node.target)
        if namespace != "torchweld":
            return f"torch.ops.{node.target}"
        if name == "dequantize":
            format = str(node.args[1])
            self.inlined[format] = decode_source(format)
            return f"decode_{format.lower()}"
        if name not in _INLINED:
            raise NotImplementedError(
                f"reference: node {node.name} calls {node.target}, which has no plain source"
            )
        function, sources = _INLINED[name]
        self.inlined |= {source.__name__: plain_source(source) for source in sources}
        return function

    def device(self) -> str:
        """Where the tensors are."""
        return next((f"{name}.device" for name in self.signature.tensors.values()), '"cpu"')

    def argument(self, value: object) -> str:
        """An argument as Python text."""
        if isinstance(value, fx.Node):
            return self.texts[value]
        if isinstance(value, torch.SymInt):
            return _size_text(size_expr(value))
        if isinstance(value, tuple | list):
            return "[" + ", ".join(self.argument(v) for v in value) + "]"
        if isinstance(value, float):
            return literal(value).text
        if isinstance(value, slice):
            return f"slice({self.argument(value.start)}, {self.argument(value.stop)}, {self.argument(value.step)})"
        return self.device() if isinstance(value, torch.device) else repr(value)


def _size_text(expr: Expr) -> str:
    return index_text(sympy.sympify(expr), lambda symbol: Value(str(symbol))).text


def plain_source(function: Callable[..., object]) -> str:
    """The source of a function of ours without annotations and without the check of its arguments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    node = tree.body[0]
    if not isinstance(node, ast.FunctionDef):
        raise TypeError(f"{function.__name__}: expected a function")
    node.returns = None
    for argument in node.args.args:
        argument.annotation = None
    node.body = [s for s in node.body if not re.match(r"_check\w*\(", ast.unparse(s))]
    return ast.unparse(node)


# -- stored formats -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Read(Term):
    """A little-endian number at a byte offset of every block."""

    offset: Expr


def decode_source(format: str) -> str:
    """`decode_<format>(data, format, columns)` in plain torch: uint8 [..., row_bytes] -> float32 [..., columns]."""
    stored = get_format(format)
    i = sympy.Symbol("i", integer=True, nonnegative=True)
    root = decode_terms(format, lambda offset, dtype: _Read(dtype, sympy.sympify(offset)), i)
    lines: list[str] = []
    value = _decode_text(root, lines, {})
    head = f"""
        def decode_{format.lower()}(data, format, columns):
            \"\"\"Rows of {format} blocks, uint8 [..., row_bytes], as float32 [..., columns].\"\"\"
            if data.numel() > 2**20 and data.dim() == 2 and len(data) > 64:  # in pieces, to keep memory small
                return torch.cat([decode_{format.lower()}(rows, format, columns) for rows in data.split(64)])
            blocks = data.reshape(*data.shape[:-1], columns // {stored.block}, {stored.block_bytes})
            i = torch.arange({stored.block}, device=data.device)

            def read(offset, dtype):
                places = (offset + 0 * i)[:, None] + torch.arange(dtype.itemsize, device=data.device)
                return blocks[..., places].contiguous().view(dtype).squeeze(-1)

        """
    body = [*lines, f"return {value}.flatten(-2)"]
    return textwrap.dedent(head).strip("\n") + "\n\n" + "\n".join(f"    {line}" for line in body)


def _decode_text(term: Term, lines: list[str], known: dict[int, str]) -> str:
    """The variable or text that holds a term of a decode."""
    if id(term) in known:
        return known[id(term)]
    match term:
        case Const():
            return literal(term.value).operand
        case IndexValue():
            text = index_text(term.expr, lambda symbol: Value(str(symbol))).operand
            return f"({text})"
        case _Read():
            text = f"read({index_text(term.offset, lambda symbol: Value(str(symbol))).text}, {term.dtype})"
        case Op():
            text = _decode_op(term, [_decode_text(arg, lines, known) for arg in term.args])
        case _:
            raise NotImplementedError(f"decode: {type(term).__name__}")
    known[id(term)] = f"v{len(known)}"
    lines.append(f"{known[id(term)]} = {text}")
    return known[id(term)]


def _decode_op(term: Op, args: Sequence[str]) -> str:
    if term.name == "cast":
        return f"{args[0]}.to({term.dtype})"
    if term.name == "where":
        return f"torch.where({', '.join(args)})"
    template = SPELLINGS[term.name].template
    return template.format(**dict(zip("pq", args, strict=False)), **dict(zip("abc", args, strict=False)))
