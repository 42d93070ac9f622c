"""Spell an einsum as permutes, reshapes and one product.

before:  einsum("bqhd,bkhd->bhqk", [q, k]); einsum("btc,chd->bthd", [x, w]); einsum("bhsd,g->bhgsd", [x, y])
after:   matmul(permute(q), permute(k)); reshape(matmul(x, reshape(w))); mul(reshape(x), reshape(y))
why:     attention, linears and fusion know one product; an einsum hides it
legal:   one or two operands; plain letters, none twice in an operand; every letter of an operand is in the
         result or in both operands; sizes of 1 do not stand for broadcasting; sizes can be read
source:  opt_einsum (Smith and Gray, 2018): a pairwise contraction is a batched matrix product
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from torch import fx

from torchweld.graph.match import aten, rank_of, shape_of
from torchweld.graph.rewrite import (
    Exactness,
    Refusal,
    Rule,
    RuleSite,
    Spelling,
    Target,
    apply_rule,
    check_rule,
    find_by_rules,
)
from torchweld.passes.canonicalize_views import read_sizes

NAME: Final = "canonicalize_einsum"
EXACTNESS: Exactness = "reassoc"


@dataclass(frozen=True)
class _Operand:
    """A tensor whose axes are named by letters."""

    value: fx.Node | Spelling
    letters: str


@dataclass(frozen=True)
class _Contraction:
    """One einsum: the node, the size of every letter, and views made for it."""

    graph_module: fx.GraphModule
    node: fx.Node
    sizes: dict[str, Any]

    def permuted(self, operand: _Operand, letters: str) -> fx.Node | Spelling:
        """`operand` with its axes in the order of `letters`."""
        if letters == operand.letters:
            return operand.value
        return Spelling(aten.permute.default, (operand.value, [operand.letters.index(x) for x in letters]))

    def reshaped(self, value: Any, shape: Sequence[Any]) -> Any:
        """`value` in another shape; None where a size cannot be read."""
        sizes = read_sizes(self.graph_module, self.node, shape)
        return None if sizes is None else Spelling(aten.reshape.default, (value, sizes))

    def spread(self, operand: _Operand, letters: str) -> Any:
        """`operand` with the axes `letters`, of size 1 where it has none of that name."""
        own = "".join(letter for letter in letters if letter in operand.letters)
        value = self.permuted(operand, own)
        if own == letters:
            return value
        return self.reshaped(value, [self.sizes[x] if x in operand.letters else 1 for x in letters])


def _einsum(graph_module: fx.GraphModule, node: fx.Node) -> Spelling | fx.Node | Refusal:
    equation, tensors = str(node.args[0]).replace(" ", ""), node.args[1]
    assert isinstance(tensors, (list, tuple))
    given, arrow, result = equation.partition("->")
    names = given.split(",")
    if not arrow or not all(part.isalpha() for part in names) or not (result.isalpha() or not result):
        return Refusal("the equation has no arrow, or more than letters", node)
    if len(names) > 2:
        return Refusal("an einsum of more than two operands", node)
    operands = [_Operand(tensor, letters) for tensor, letters in zip(tensors, names, strict=True)]
    sizes = _sizes(operands)
    if sizes is None or any(len(set(part)) != len(part) for part in (*names, result)):
        return Refusal("a letter stands twice in one operand, or for two sizes", node)
    contraction = _Contraction(graph_module, node, sizes)
    spelled = _respell(contraction, operands, result)
    return (
        Refusal("a letter is summed in one operand, or a size cannot be read", node)
        if spelled is None
        else spelled
    )


def _sizes(operands: Sequence[_Operand]) -> dict[str, Any] | None:
    """The size of every letter; None where two operands disagree, as they may where one has size 1."""
    sizes: dict[str, Any] = {}
    for operand in operands:
        assert isinstance(operand.value, fx.Node)
        if rank_of(operand.value) != len(operand.letters):
            return None
        for letter, size in zip(operand.letters, shape_of(operand.value), strict=True):
            if sizes.setdefault(letter, size) != size:
                return None
    return sizes


def _respell(contraction: _Contraction, operands: Sequence[_Operand], result: str) -> Any:
    """The product of the operands with the axes of `result`; None where none expresses it."""
    letters = [set(operand.letters) for operand in operands]
    if len(operands) == 1:
        return contraction.permuted(operands[0], result) if letters[0] == set(result) else None
    left, right = operands
    if any(own - set(result) - other for own, other in (letters, reversed(letters))):
        return None
    summed = "".join(x for x in left.letters if x in right.letters and x not in result)
    if not summed:
        factors = [contraction.spread(operand, result) for operand in operands]
        return None if None in factors else Spelling(aten.mul.Tensor, tuple(factors))
    if not letters[0] & letters[1] & set(result):
        return _product_with_matrix(contraction, left, right, summed, result)
    return _batched_product(contraction, left, right, summed, result)


def _ordered(names: str, order: str) -> str:
    return "".join(letter for letter in order if letter in names)


def _product_with_matrix(
    contraction: _Contraction, left: _Operand, right: _Operand, summed: str, result: str
) -> Any:
    """No letter is in all three: left [rows..., k] times right [k, columns], with k and the columns merged."""
    rows = _ordered(left.letters, result)
    columns = _ordered(right.letters, result)
    value, matrix = contraction.permuted(left, rows + summed), contraction.permuted(right, summed + columns)
    sizes = contraction.sizes
    inner, outer = (prod([sizes[x] for x in part]) for part in (summed, columns))
    if len(summed) > 1:
        value = contraction.reshaped(value, [*(sizes[x] for x in rows), inner])
    if len(summed) > 1 or len(columns) != 1:
        matrix = contraction.reshaped(matrix, [inner, outer])
    if value is None or matrix is None or not rows:
        return None
    product: Any = Spelling(aten.matmul.default, (value, matrix))
    if len(columns) != 1:
        product = contraction.reshaped(product, [sizes[x] for x in rows + columns])
    return product and contraction.permuted(_Operand(product, rows + columns), result)


def _batched_product(
    contraction: _Contraction, left: _Operand, right: _Operand, summed: str, result: str
) -> Any:
    """Left [batch..., row, k] times right [batch..., k, column]; of several own letters of an operand the last
    is its row or column, and the others are batch axes that the other operand lacks."""
    own = [_ordered(one.letters, "".join(x for x in result if x not in other.letters))
           for one, other in ((left, right), (right, left))]  # fmt: skip
    row, column = (part[-1:] for part in own)
    batch = "".join(x for x in result if x not in row + column)
    if not row or not column or len(summed) != 1:
        return None
    first = contraction.spread(left, batch + row + summed)
    second = contraction.spread(right, batch + summed + column)
    if first is None or second is None:
        return None
    product = Spelling(aten.matmul.default, (first, second))
    return contraction.permuted(_Operand(product, batch + row + column), result)


RULES: Final[dict[Target, Rule]] = {aten.einsum.default: _einsum}


def find(graph_module: fx.GraphModule) -> Iterator[RuleSite]:
    """Every einsum."""
    return find_by_rules(graph_module, RULES)


def check(graph_module: fx.GraphModule, site: RuleSite) -> Refusal | None:
    """See `legal` above."""
    return check_rule(graph_module, site)


def rewrite(graph_module: fx.GraphModule, site: RuleSite) -> None:
    """Put the product in place of the einsum."""
    apply_rule(graph_module, site, NAME)
