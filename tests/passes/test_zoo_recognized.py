"""Every small Hugging Face architecture ends with exactly its layers' attentions, and with the same numbers."""

import pytest
import torch

from tests.zoo import LAYERS, ZOO
from torchweld.graph.capture import capture
from torchweld.graph.rewrite import run_pass
from torchweld.passes import CANONICALIZE, RECOGNIZE

ATTENTION = torch.ops.torchweld.attention.default
ROPE = torch.ops.torchweld.rope.default
aten = torch.ops.aten

ROTARY = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "falcon",
    "olmo2",
} | {
    "granite",
    "stablelm",
    "starcoder2",
}
# Spelled-out attention differs little between the decoders: a few stand for all.
SPELLED_OUT = ("llama", "mistral", "gpt2", "falcon", "t5")
CASES = [(name, ZOO[name].attentions[0]) for name in sorted(ZOO)] + [
    (name, "eager") for name in sorted(ZOO) if name.startswith(SPELLED_OUT) and len(ZOO[name].attentions) > 1
]
LEFTOVERS = {
    aten.softmax.int,
    aten.scaled_dot_product_attention.default,
    aten.rsqrt.default,
    aten.erf.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.view.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.split.Tensor,
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_zoo(name: str, attention: str) -> None:
    entry = ZOO[name]
    model = entry.make(attention)
    inputs = entry.inputs(batch=2, length=9)
    if entry.kind == "causal":
        del inputs["attention_mask"]
    program = capture(model, (), inputs, verify=False)
    for pass_ in (*CANONICALIZE, *RECOGNIZE):
        run_pass(program.graph_module, pass_)
    targets = [node.target for node in program.graph.nodes]
    attentions = program.graph.find_nodes(op="call_function", target=ATTENTION)
    assert len(attentions) == LAYERS
    assert targets.count(ROPE) == (2 * LAYERS if name in ROTARY else 0)
    assert not LEFTOVERS & set(targets)
    if entry.kind == "causal":
        kinds = {node.args[4] for node in attentions}
        assert kinds <= {"causal", "window"} and all("mask_proof" in node.meta for node in attentions)
        assert name == "bloom" or all(node.args[3] is None for node in attentions)
    other = entry.inputs(batch=1, length=13, seed=1)
    other = {key: value for key, value in other.items() if key in inputs}
    with torch.no_grad():
        expected, found = model(**other)[0], program.run(**other)
    found = found[0] if isinstance(found, tuple) else next(iter(found.values()))  # type: ignore[attr-defined]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
