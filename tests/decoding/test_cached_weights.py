"""Real weights: SmolLM2 and Gemma 3 with the derived cache, against no cache and Hugging Face's cached generation."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.models.test_models import GEMMA_NAMES, LLAMA_NAMES, hugging_face_twin
from torchweld.decoding.cached import CachedModel
from torchweld.decoding.generate import generate
from torchweld.graph.capture import capture
from torchweld.models.gguf import read_gguf
from torchweld.models.load import LoadedModel, load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLOSE = 2e-3
"""Logits of two float32 runs of these models differ by less; so a smaller gap may be decided either way."""

CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "smollm2": transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
    ),
    "gemma3": transformers.Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, sliding_window=512, max_position_embeddings=32768,
        query_pre_attn_scalar=256, rope_theta=1e6, rope_local_base_freq=1e4, rms_norm_eps=1e-6,
        sliding_window_pattern=6,
    ),
}  # fmt: skip
CLASSES = {"smollm2": transformers.LlamaForCausalLM, "gemma3": transformers.Gemma3ForCausalLM}
PROMPT = "The tallest mountain on Earth is Mount Everest. It was first climbed in 1953. "


@lru_cache
def loaded(name: str) -> LoadedModel:
    return load_model(name)


@lru_cache
def cached(name: str) -> CachedModel:
    model = CachedModel(capture(loaded(name).module, loaded(name).example_inputs, verify=False))
    assert model.compiled().eager_reason is None
    return model


def hugging_face(name: str) -> nn.Module:
    """Their model with the same weights, decoded by gguf.quants."""
    with torch.device("meta"):
        theirs: nn.Module = CLASSES[name](CONFIGS[name])
    for module in theirs.modules():
        if hasattr(module, "rotary_emb"):
            module.rotary_emb = type(module.rotary_emb)(CONFIGS[name])
        if hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(CONFIGS[name].hidden_size ** 0.5)
    hugging_face_twin(read_gguf(loaded(name).path), theirs, loaded(name).module, {
        "smollm2": LLAMA_NAMES, "gemma3": GEMMA_NAMES,
    }[name])  # fmt: skip
    return theirs.eval()


def prompt_of(name: str, length: int) -> Tensor:
    tokenizer = loaded(name).tokenizer
    assert tokenizer is not None
    tokens = tokenizer.encode(PROMPT * (length // 10 + 1))[:length]
    assert len(tokens) == length
    return torch.tensor([tokens])


# Gemma's prompt ends just before its window of 512, so that the new tokens turn the ring.
@pytest.mark.parametrize(("name", "length", "new"), [("smollm2", 40, 64), ("gemma3", 490, 40)])
def test_greedy_tokens_equal_hugging_face_generation(name: str, length: int, new: int) -> None:
    prompt = prompt_of(name, length)
    result = hugging_face(name).generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False,
        use_cache=True, return_dict_in_generate=True, output_logits=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = result.sequences[0, length:].tolist()
    ours = list(generate(cached(name), prompt, max_new_tokens=new).tokens)
    assert len(ours) == len(theirs) == new
    assert len(set(ours)) > 10, "a constant answer would prove nothing"
    for step, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
        if mine != their:
            best, second = result.logits[step][0].topk(2).values.tolist()
            print(
                f"{name}: first difference at step {step}, where the two best logits are {best - second:.2g} apart"
            )
            assert best - second < CLOSE
            break
    else:
        print(f"{name}: all {new} tokens equal")


@pytest.mark.parametrize(("name", "length"), [("smollm2", 60), ("gemma3", 530)])
def test_steps_equal_no_cache_and_each_other(name: str, length: int) -> None:
    """Single tokens and many give the same bits, and both are what the model without a cache gives."""
    model, ids = cached(name), prompt_of(name, length)
    with torch.no_grad():
        expected = loaded(name).module(ids)[:, -4:]
    model.prefill(ids[:, :-4])
    many = model.step(ids[:, -4:], logits_for="all")
    torch.testing.assert_close(many, expected, rtol=1e-3, atol=CLOSE)
    model.truncate(length - 4)
    single = torch.cat([model.step(ids[:, at : at + 1]) for at in range(length - 4, length)], 1)
    assert torch.equal(many, single)
    model.truncate(length - 4)
    parents = [-1, -1, 0, 1, 2, 3, 4, 6]
    tree = ids[:, [length - 4, 3, length - 3, 4, length - 2, 5, length - 1, 6]]
    found = model.step(tree, parents=parents, logits_for=[0, 2, 4, 6])
    assert torch.equal(found, single)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_few_kernels_per_layer(name: str) -> None:
    model = cached(name)
    model.prefill([[1, 2]])
    executable = model.compiled().executable
    assert executable is not None and executable._placed is not None
    launches = [launch for group in executable._placed.launches for launch in group]
    assert len(launches) <= 8 * len(model.states) + 2
