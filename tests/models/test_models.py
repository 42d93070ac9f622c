"""The plain models give the logits of Hugging Face's, at every size, from folders and from GGUF files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import quants
from torch import Tensor, nn

from torchweld.models.builtin import find_builtin
from torchweld.models.from_folder import model_from_folder
from torchweld.models.from_gguf import GgufSource, model_from_gguf
from torchweld.models.gguf import GgufFile, read_gguf
from torchweld.models.load import LoadedModel, load_model


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Many small ops: on a busy machine torch's threads wait for each other far longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(kind: str) -> transformers.PretrainedConfig:
    common = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
    grouped = common | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    if kind == "llama":
        return transformers.LlamaConfig(**grouped, tie_word_embeddings=False, rope_theta=5e4)
    if kind == "gemma3_text":
        return transformers.Gemma3TextConfig(**grouped, sliding_window=5, sliding_window_pattern=3)
    if kind == "gpt2":
        return transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=32)
    return transformers.BertConfig(**common, num_attention_heads=4, max_position_embeddings=32)


CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "gemma3_text": transformers.Gemma3ForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "bert": transformers.BertModel,
}


def save_tiny(kind: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A tiny Hugging Face model with weights that matter, saved to `folder`; returned as float32."""
    torch.manual_seed(7)
    model = CLASSES[kind](tiny_config(kind)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.dim() > 1 else 0.5))
    model.to(dtype).save_pretrained(folder)
    # read again rather than model.float(): that would keep rotary frequencies rounded to dtype
    return CLASSES[kind].from_pretrained(folder, dtype=torch.float32).eval()


def reference(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return output.logits if "logits" in output else output.last_hidden_state


def ours(model: nn.Module, ids: Tensor, kind: str = "") -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids, torch.ones_like(ids)) if kind == "bert" else model(ids)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_folder_equals_hugging_face(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = save_tiny(kind, tmp_path, dtype)
    mine = model_from_folder(tmp_path)
    for batch, length in ((1, 1), (2, 3), (3, 17)):
        ids = torch.randint(0, 97, (batch, length))
        want = reference(theirs, ids)
        assert (ours(mine, ids, kind) - want).abs().max() < 2e-5 * want.abs().max()


def test_stored_formats_stay_in_the_model(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, torch.bfloat16)
    state = model_from_folder(tmp_path).state_dict()
    assert state["layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert state["layers.0.mlp.up_proj.weight"].shape == (80, 96)
    assert state["norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
def test_decoder_is_causal(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path, torch.float32)
    model = model_from_folder(tmp_path)
    ids = torch.randint(0, 97, (1, 12))
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 97
    before, after = ours(model, ids)[0], ours(model, changed)[0]
    assert torch.allclose(before[:8], after[:8], atol=1e-5)
    assert not torch.allclose(before[8:], after[8:], atol=1e-3)


@pytest.mark.parametrize("kind", CLASSES)
def test_exports_with_dynamic_sizes(kind: str, tmp_path: Path) -> None:
    save_tiny(kind, tmp_path, torch.bfloat16)
    model = model_from_folder(tmp_path)
    count = 2 if kind == "bert" else 1
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=32)}
    example = tuple(torch.ones(2, 6, dtype=torch.long) for _ in range(count))  # one object twice is one input
    program = torch.export.export(model, example, dynamic_shapes=(sizes,) * count).module()
    for batch, length in ((1, 1), (1, 9), (3, 20)):
        ids = torch.randint(0, 97, (batch, length))
        assert torch.allclose(ours(program, ids, kind), ours(model, ids, kind), atol=1e-4)


def test_bert_does_not_see_padding(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path, torch.float32)
    model = model_from_folder(tmp_path)
    ids = torch.randint(1, 97, (1, 9))
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.long)), dim=1)
    mask = (torch.arange(13) < 9).long()[None]
    with torch.no_grad():
        assert torch.allclose(model(padded, mask)[:, :9], model(ids, torch.ones_like(ids)), atol=1e-5)


def write_gguf(theirs: transformers.LlamaForCausalLM, path: Path) -> None:
    """The model as llama.cpp's converter writes it: rows of queries and keys reordered, F32."""
    config = theirs.config
    parts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5e4)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in theirs.state_dict().items():
        heads = parts.get(name.split(".")[-2])
        if heads:  # convert_hf_to_gguf.py, LlamaModel.permute
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_llama_gguf_rows_are_put_back(tmp_path: Path) -> None:
    theirs = save_tiny("llama", tmp_path, torch.float32)
    write_gguf(theirs, tmp_path / "tiny.gguf")
    ids = torch.randint(0, 97, (2, 11))
    want = reference(theirs, ids)
    mine = model_from_gguf(read_gguf(tmp_path / "tiny.gguf"))
    assert (ours(mine, ids) - want).abs().max() < 2e-5 * want.abs().max()


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2")


@pytest.fixture(scope="module")
def gemma3() -> LoadedModel:
    return load_model("gemma3")


def dequantized(file: GgufFile, name: str, heads: int = 0) -> Tensor:
    """A tensor decoded by gguf.quants; with `heads`, its rows in Hugging Face's order."""
    data = GgufSource(file, {name: heads} if heads else {}).read(name).numpy()
    kind = gguf.GGMLQuantizationType[file.tensors[name].format]
    return torch.from_numpy(np.ascontiguousarray(quants.dequantize(data, kind)))


def hugging_face_twin(file: GgufFile, theirs: nn.Module, mine: nn.Module, names: dict[str, str]) -> None:
    """Fill a Hugging Face model with a GGUF file's weights, decoded by gguf.quants."""
    heads = {"attn_q": theirs.config.num_attention_heads, "attn_k": theirs.config.num_key_value_heads}
    is_llama = theirs.config.model_type == "llama"
    state = {}
    for name in file.tensors:
        block = name.split(".")
        if block[0] != "blk":
            top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[block[0]]
            state[f"{top}.weight"] = dequantized(file, name)
        else:
            turned = heads.get(block[2], 0) if is_llama else 0
            state[f"model.layers.{block[1]}.{names[block[2]]}.weight"] = dequantized(file, name, turned)
    if not is_llama:  # Hugging Face's Gemma holds norm weights as w, GGUF as w + 1
        state = {k: v - 1 if k.endswith("norm.weight") else v for k, v in state.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, strict=True, assign=True)


LLAMA_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GEMMA_NAMES = LLAMA_NAMES | {
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def check_twin(loaded: LoadedModel, theirs: nn.Module, names: dict[str, str]) -> None:
    hugging_face_twin(read_gguf(loaded.path), theirs, loaded.module, names)
    ids = torch.randint(10, 40_000, (1, 16), generator=torch.Generator().manual_seed(3))
    want = reference(theirs.eval(), ids)
    assert (ours(loaded.module, ids) - want).abs().max() < 1e-3
    assert want.std() > 0.5  # a check of near-constant logits would prove nothing


@pytest.mark.slow
def test_smollm2_equals_hugging_face(smollm2: LoadedModel) -> None:
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, rope_theta=1e5,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    check_twin(smollm2, theirs, LLAMA_NAMES)


@pytest.mark.slow
def test_gemma3_equals_hugging_face(gemma3: LoadedModel) -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256,
        sliding_window=512, max_position_embeddings=32768,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.Gemma3ForCausalLM(config)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    theirs.model.embed_tokens.embed_scale = torch.tensor(640**0.5)
    check_twin(gemma3, theirs, GEMMA_NAMES)


def test_minilm_equals_hugging_face() -> None:
    path = find_builtin("minilm")
    theirs = transformers.BertModel.from_pretrained(path).eval()
    loaded = load_model("minilm")
    ids = torch.randint(1000, 30_000, (2, 9))
    mask = torch.ones_like(ids)
    hidden = reference(theirs, ids)
    with torch.no_grad():
        assert (loaded.module.bert(ids, mask) - hidden).abs().max() < 1e-4  # type: ignore[operator, union-attr]
        vectors = loaded.module(ids, mask)
    assert torch.allclose(vectors, nn.functional.normalize(hidden.mean(1), dim=-1), atol=1e-5)


def complete(loaded: LoadedModel, prompt: str, count: int) -> str:
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode(prompt)
    start = len(ids)
    for _ in range(count):
        ids.append(int(ours(loaded.module, torch.tensor([ids]))[0, -1].argmax()))
    return loaded.tokenizer.decode(ids[start:])


@pytest.mark.slow
def test_smollm2_completes_in_english(smollm2: LoadedModel) -> None:
    assert complete(smollm2, "The capital of France is", 1) == " Paris"


@pytest.mark.slow
def test_gemma3_completes_in_english(gemma3: LoadedModel) -> None:
    assert complete(gemma3, "The sun rises in the east and sets in the", 1) == " west"


def test_tied_head_shares_one_tensor(smollm2: LoadedModel) -> None:
    state = dict(smollm2.module.named_buffers(remove_duplicate=False))
    assert state["lm_head.weight"] is state["embed_tokens.weight"]
