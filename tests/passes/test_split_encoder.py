"""The encoder's program: what a step reads of it, from the other inputs alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.encoder_decoders import Translator, draw_tokens
from tests.passes.support import check_metas
from torchweld.graph.capture import capture
from torchweld.graph.program import Program
from torchweld.graph.rewrite import run_pass
from torchweld.passes import CANONICALIZE, RECOGNIZE
from torchweld.passes.rewrite_kv_cache import StepProgram, derive_step, with_tree


def derived(model: Translator, **inputs: Tensor) -> tuple[Program, StepProgram]:
    program = capture(model.eval(), (), inputs, verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    step = derive_step(program)
    assert isinstance(step, StepProgram), step
    return program, step


def test_the_encoder_gives_keys_values_and_the_mask() -> None:
    model = Translator()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    program, step = derived(model, source=draw_tokens(2, 9, 0), target=draw_tokens(2, 7, 1), source_mask=mask)
    assert step.encoder is not None
    assert [node.name for node in step.encoder.placeholders] == ["source", "source_mask"]
    assert "target" in [node.name for node in program.placeholders], "the source program stays as it is"
    source = draw_tokens(3, 5, 2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    check_metas(step.encoder.graph_module, (source, mask))
    key, value, seen = step.encoder.run(source=source, source_mask=mask)  # type: ignore[misc]
    memory = model.encode(source, mask)
    for found, weight in ((key, model.ck), (value, model.cv)):
        torch.testing.assert_close(found, (memory @ weight.T).unflatten(2, (2, -1)).transpose(1, 2))
    assert torch.equal(seen, (mask != 0)[:, None, None, :])


def test_what_is_encoded_stands_before_the_caches() -> None:
    _, step = derived(Translator(), source=draw_tokens(2, 9, 0), target=draw_tokens(2, 7, 1))
    encoded = [torch.zeros(3, 2, 5, 6)] * 2
    caches = [torch.zeros(3, 2, 8, 6)] * 2
    ids, places = draw_tokens(3, 2, 3), torch.tensor([[1, 2]] * 3)
    check_metas(step.program.graph_module, (ids, places[:, 0], places, torch.arange(4), *encoded, *caches))
    names = ["ids", "past", "positions", "rows", "encoded_0", "encoded_1", "key_0", "value_0"]
    assert [node.name for node in step.program.placeholders] == names
    assert step.program.parameters == (*names[:6], "caches")
    tree = with_tree(step).program
    assert [node.name for node in tree.placeholders] == [*names[:4], "path", *names[4:]]
    assert tree.in_spec.num_leaves == len(names) + 1
    (cross,) = step.crosses
    assert (cross.kind, cross.heads, cross.bytes_per_token) == ("cross", 2, 2 * (6 + 6) * 4)
    assert [state.kind for state in step.states] == ["causal"]


def test_the_encoder_is_no_part_of_the_step() -> None:
    _, step = derived(Translator(), source=draw_tokens(2, 9, 0), target=draw_tokens(2, 7, 1))
    read = {str(node.target) for node in step.program.graph.find_nodes(op="get_attr")}
    assert read.isdisjoint({"eq", "ek", "ev", "ck", "cv"}), (
        "weights of the encoder and of cross keys and values"
    )
