"""Give a step program a second way to end: the greatest logit and its token for rows whose logits nobody reads.

before:  logits [1, R, V], caches = step(ids, past, positions, rows[R], ...)
after:   logits [1, R, V], caches, scores [1, Q], tokens [1, Q] = step(ids, past, positions, rows[R], chosen[Q], ...)
why:     greedy decoding wants one number of V; the output head then searches its products and stores none
         (codegen/families/choice.py). Both R and Q may be 0, so that one compiled step serves both wishes.
legal:   the logits are a linear of the chosen rows, followed by work on single elements of it; they are float32 or
         float64 (16-bit logits are rounded when they are stored, and only then compared)

Of equal logits the lowest token wins, NaN is greater than all numbers.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Final

import torch
import torch.utils._pytree as pytree
from torch import fx

from torchweld.graph.edit import insert_node
from torchweld.graph.match import aten, dtype_of, is_call, tensor_of
from torchweld.graph.program import Program, find_fake_mode
from torchweld.graph.rewrite import Refusal
from torchweld.passes.rewrite_kv_cache import StepProgram
from torchweld.passes.step_inputs import new_size

NAME: Final = "step_choice"
INPUT: Final = "chosen"
_TRACED = 1021


def with_choices(step: StepProgram) -> StepProgram | Refusal:
    """The same step with the input `chosen` int64 [Q] behind `rows` and two results behind the caches; or why not."""
    program = step.program.copied()
    logits, *caches = program.outputs
    rows = next(node for node in program.placeholders if node.name == "rows")
    assert isinstance(logits, fx.Node)
    behind = _behind(rows)
    refusal = _check(logits, behind)
    if refusal is not None:
        return refusal
    chosen = _add_input(program, rows)
    copies = {rows: chosen}
    output = program.graph.output_node()
    for node in program.graph.nodes:
        if node in behind:
            arguments = fx.map_arg((node.args, node.kwargs), lambda n: copies.get(n, n))
            copies[node] = insert_node(
                program.graph, output, node.target, arguments[0], arguments[1], made_by=NAME, like=node
            )

    def make(target: object, *args: object) -> fx.Node:
        return insert_node(program.graph, output, target, args, made_by=NAME, like=logits)  # type: ignore[arg-type]

    best = make(aten.max.dim, copies[logits], -1)
    found = (make(operator.getitem, best, 0), make(operator.getitem, best, 1))
    output.args = ((logits, *caches, *found),)
    program.graph.lint()
    program.graph_module.recompile()
    return replace(step, program=_signed(program, len(caches)), chooses=True)


def _behind(rows: fx.Node) -> set[fx.Node]:
    """What is computed of `rows`."""
    found: set[fx.Node] = set()
    pending = [rows]
    while pending:
        for user in pending.pop().users:
            if user.op != "output" and user not in found:
                found.add(user)
                pending.append(user)
    return found


def _check(logits: fx.Node, behind: set[fx.Node]) -> Refusal | None:
    """One line per clause of `legal`."""
    node = logits
    while not is_call(node, aten.linear.default):
        sources = [source for source in node.all_input_nodes if source in behind and _is_tensor(source)]
        if len(sources) != 1:
            return Refusal("the logits are no linear of the chosen rows with work on single elements", node)
        (node,) = sources
    if dtype_of(logits) not in (torch.float32, torch.float64):
        return Refusal(f"logits of {dtype_of(logits)} are compared as they are rounded", logits)
    return None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _add_input(program: Program, rows: fx.Node) -> fx.Node:
    with program.graph.inserting_after(rows):
        chosen = program.graph.placeholder(INPUT)
    mode = find_fake_mode(program.graph)
    assert mode is not None and mode.shape_env is not None
    with mode:
        size = new_size(mode.shape_env, INPUT, _TRACED)
        chosen.meta["val"] = torch.empty((size,), dtype=torch.int64, device=tensor_of(rows).device)
    chosen.meta["made_by"] = NAME
    return chosen


def _signed(program: Program, caches: int) -> Program:
    """The signature with the new input behind `rows` and the new results behind the caches."""
    *plain, held = program.parameters
    at = plain.index("rows") + 1
    plain.insert(at, INPUT)
    leaves = tuple(node.name for node in program.placeholders)
    count = len(leaves) - caches
    return replace(
        program,
        in_spec=pytree.tree_structure(((*leaves[:count], leaves[count:]), {})),
        out_spec=pytree.tree_structure(("logits", leaves[count:], "scores", "tokens")),
        parameters=(*plain, held),
    )
