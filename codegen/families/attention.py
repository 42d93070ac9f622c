"""Attention kernels: online softmax over the keys, for one tile of queries of one head.

formula:  s_j = scale * sum_d q_d k_jd, capped and masked;  (m, l, o) <- combine over j of (s_j, 1, v_j);  out = o / l
          sinks: one more (s, 1, 0), combined once for each row
shapes:   batch axes (batch, head), t queries, features of v; grouped heads read their group's keys by index
prologue: pointwise on the query only: keys and values are read once per tile of queries, so work on them is refused
epilogue: pointwise on the result
cache:    keys and values are read by position through their slots, see Attend in graph/terms.py
source:   Dao et al., FlashAttention; Milakov and Gimelshein, online normalizer calculation
"""

from __future__ import annotations

from collections.abc import Sequence

from torchweld.codegen.families.common import Dependence, reductions, with_references
from torchweld.codegen.ir import AttentionPart, Bind, Store
from torchweld.graph.meaning import Unsupported
from torchweld.graph.terms import Attend, Axis, Contract, Fold, Load, Op, Ref, Term, walk


def build_attention_part(
    axes: tuple[Axis, ...], stores: Sequence[Store], dependence: Dependence, name: str
) -> AttentionPart:
    """A part around the one attend of `stores`, over `axes` = (batch, head, query, feature)."""
    attends = [term for term in reductions([s.value for s in stores], Attend) if isinstance(term, Attend)]
    if len(attends) != 1:
        raise Unsupported(f"{len(attends)} attentions in one kernel part")
    attend = attends[0]
    for root in [store.value for store in stores]:
        if any(isinstance(node, (Fold, Contract)) for node in walk(root)):
            raise Unsupported("a reduction or a matmul in one kernel part with an attention")
    for operand, what in ((attend.k, "keys"), (attend.v, "values")):
        if not _is_plain(operand):
            raise Unsupported(
                f"work on the {what} of an attention would be done again for every tile of queries"
            )
    *batch, t, feature = axes
    _check_axes(attend, batch, t, feature, dependence)
    refs = {id(attend): Ref(attend.dtype, name)}
    new_stores = tuple(Store(s.buffer, s.index, with_references(s.value, refs)) for s in stores)
    return AttentionPart(tuple(batch), t, feature, Bind(name, attend), new_stores)


def _is_plain(term: Term) -> bool:
    """A load, or a load widened or narrowed."""
    while isinstance(term, Op) and term.name == "cast":
        term = term.args[0]
    return isinstance(term, Load)


def _check_axes(
    attend: Attend, batch: Sequence[Axis], t: Axis, feature: Axis, dependence: Dependence
) -> None:
    outer = {axis.symbol for axis in batch}
    allowed = {
        "query": (attend.q, outer | {t.symbol, attend.d.symbol}),
        "keys": (attend.k, outer | {attend.s.symbol, attend.d.symbol}),
        "values": (attend.v, outer | {attend.s.symbol, feature.symbol}),
    }
    if attend.mask is not None:
        allowed["mask"] = (attend.mask, outer | {t.symbol, attend.s.symbol})
    if attend.past is not None:
        allowed["past lengths"] = (attend.past, {batch[0].symbol})
    if attend.path is not None and attend.steps is not None:
        allowed["paths"] = (attend.path, {batch[0].symbol, t.symbol, attend.steps.symbol})
    if attend.sinks is not None:
        allowed["sinks"] = (attend.sinks, outer)
    for what, (term, symbols) in allowed.items():
        if dependence.of(term) - symbols:
            raise Unsupported(f"the {what} of an attention depend on more than their own axes")
