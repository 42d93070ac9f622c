"""load_model: every kind of MODEL, and one clear line for everything that is none."""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchweld.models import builtin
from torchweld.models.builtin import BUILTINS, Builtin, cache_folder, find_builtin
from torchweld.models.errors import ModelFileError
from torchweld.models.load import load_model, supported_architectures

CONFIG = {
    "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 12, "rms_norm_eps": 1e-6, "eos_token_id": [3, 2],
}  # fmt: skip


def tensors() -> dict[str, torch.Tensor]:
    shapes = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 8), "self_attn.v_proj": (8, 8)}
    shapes |= {"self_attn.o_proj": (8, 8), "mlp.gate_proj": (12, 8), "mlp.up_proj": (12, 8)}
    shapes |= {"mlp.down_proj": (8, 12), "input_layernorm": (8,), "post_attention_layernorm": (8,)}
    layer = {f"model.layers.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    return layer | {"model.embed_tokens.weight": torch.randn(11, 8), "model.norm.weight": torch.randn(8)}


def write_folder(
    folder: Path, *, config: object = CONFIG, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors() if weights is None else weights, folder / "model.safetensors")
    return folder


def message(spec: Path | str) -> str:
    with pytest.raises(ModelFileError) as caught:
        load_model(str(spec))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder(tmp_path: Path) -> None:
    loaded = load_model(str(write_folder(tmp_path / "tiny")))
    assert (loaded.name, loaded.architecture, loaded.kind) == ("tiny", "llama", "decoder")
    assert loaded.tokenizer is None
    assert loaded.module(*loaded.example_inputs).shape == (2, 8, 11)
    assert not loaded.module.training


def test_folder_of_shards(tmp_path: Path) -> None:
    folder, weights = write_folder(tmp_path / "a"), tensors()
    whole = folder / "model.safetensors"
    whole.unlink()
    names = sorted(weights)
    shards = {name: f"model-0000{1 + i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: weights[name] for name in names if shards[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    ids = torch.arange(6)[None]
    sharded = load_model(str(folder)).module(ids)
    index.unlink()
    save_file(weights, whole)
    assert torch.equal(sharded, load_model(str(folder)).module(ids))


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "none.safetensors", "config.json"])
def test_shard_outside_the_folder_is_refused(shard: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    (folder / "model.safetensors").replace(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    assert "shard" in message(folder)


BAD_CONFIGS = [
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[]", "expected a JSON object"),
    ({}, "'model_type' is missing"),
    (CONFIG | {"model_type": "mamba"}, "unknown architecture 'mamba'; expected one of llama"),
    (CONFIG | {"hidden_size": "8"}, "'hidden_size' is '8'"),
    (CONFIG | {"hidden_size": True}, "'hidden_size' is True"),
    (CONFIG | {"num_hidden_layers": -1}, "'num_hidden_layers' is -1"),
    (CONFIG | {"vocab_size": 2**62}, "'vocab_size'"),
    (CONFIG | {"rms_norm_eps": float("nan")}, "'rms_norm_eps' is nan"),
    (CONFIG | {"num_key_value_heads": 3}, "2 query heads share 3 key heads"),
    (CONFIG | {"head_dim": 3}, "head size 3"),
    (CONFIG | {"num_hidden_layers": 2}, "'model.layers.1.input_layernorm.weight' is missing"),
    (CONFIG | {"vocab_size": 12}, "has shape [11, 8]; expected [12, 8]"),
    (CONFIG | {"hidden_act": "relu"}, "'hidden_act' is 'relu'"),
    (CONFIG | {"attention_bias": True}, "'attention_bias'"),
    (CONFIG | {"rope_scaling": {"rope_type": "llama3"}}, "'rope_type' is 'llama3'"),
    (CONFIG | {"rope_scaling": 5}, "'rope_scaling' is 5"),
]


@pytest.mark.parametrize(("config", "words"), BAD_CONFIGS, ids=[words for _, words in BAD_CONFIGS])
def test_bad_config(config: object, words: str, tmp_path: Path) -> None:
    assert words in message(write_folder(tmp_path / "a", config=config))


def test_bad_weights(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    spoiled = {
        "has no place in the model": {"extra.weight": torch.zeros(2)},
        f"tensor '{name}' holds NaN or infinity": {name: torch.full((12, 8), float("nan"))},
        "has dtype I64": {name: torch.zeros(12, 8, dtype=torch.int64)},
        "has dtype F64": {name: torch.zeros(12, 8, dtype=torch.float64)},
        "has shape [12, 8, 1]; expected [12, 8]": {name: torch.zeros(12, 8, 1)},
        "has rank 9": {name: torch.zeros((1,) * 9)},
    }
    for words, change in spoiled.items():
        assert words in message(write_folder(tmp_path / "a", weights=tensors() | change))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_safetensors(keep: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    assert "is not a safetensors file" in message(folder)


def test_folder_without_weights_names_the_remedy(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights" in message(folder)
    assert "config.json: cannot be read" in message(tmp_path)


def test_unknown_names(tmp_path: Path) -> None:
    assert "did you mean 'smollm2'" in message("smolm2")
    assert "is a pickle" in message(write_file(tmp_path / "a.pt", b"PK"))
    assert "magic" in message(write_file(tmp_path / "a.onnx", bytes(100)))
    assert "names no factory" in message(write_file(tmp_path / "a.py", b""))
    assert "is not an exported program" in message(write_file(tmp_path / "a.pt2", b"nothing"))
    with pytest.raises(ModelFileError, match="nearest: gemma3"):
        find_builtin("gema")
    assert set(supported_architectures()) == {"llama", "gemma3", "gemma3_text", "bert", "gpt2"}


def write_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_factory(tmp_path: Path) -> None:
    code = (
        b"import torch\n"
        b"def linear(): return torch.nn.Linear(3, 2), (torch.zeros(4, 3),)\n"
        b"def bare(): return torch.nn.Linear(3, 2)\n"
        b"def number(): return 5\n"
        b"def broken(): raise KeyError('inside')\n"
    )
    path = write_file(tmp_path / "mine.py", code)
    loaded = load_model(f"{path}:linear")
    assert loaded.module(*loaded.example_inputs).shape == (4, 2)
    assert (loaded.kind, loaded.architecture, loaded.name) == ("other", "Linear", "linear")
    assert load_model(f"{path}:bare").example_inputs == ()
    assert "returned a int" in message(f"{path}:number")
    assert "raised KeyError: 'inside'" in message(f"{path}:broken")
    assert "did you mean 'linear'?" in message(f"{path}:linaer")
    assert "raised SyntaxError" in message(f"{write_file(tmp_path / 'bad.py', b'def')}:f")
    assert "no such file" in message(f"{tmp_path / 'none.py'}:f")


def test_exported_program(tmp_path: Path) -> None:
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "linear.pt2")
    loaded = load_model(str(tmp_path / "linear.pt2"))
    assert torch.equal(loaded.module(*loaded.example_inputs), model(x))


def fake_package(folder: Path, digest: str | None = None) -> None:
    """Three packages that raise when imported: one with the digest, two with halves of a file."""
    parts = (("fake_w_part1", "m.gguf.part00", b"abc"), ("fake_w_part2", "m.gguf.part01", b"def"))
    for name, file, data in parts:
        (folder / name / "data").mkdir(parents=True)
        (folder / name / "__init__.py").write_text("raise RuntimeError('executed')")
        (folder / name / "data" / file).write_bytes(data)
    (folder / "fake_w" / "data").mkdir(parents=True)
    (folder / "fake_w" / "__init__.py").write_text("raise RuntimeError('executed')")
    line = f"{digest or hashlib.sha256(b'abcdef').hexdigest()}  m.gguf\n"
    (folder / "fake_w" / "data" / "SHA256SUMS").write_text(line)
    importlib.invalidate_caches()


@pytest.fixture
def joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    entry = Builtin("fake-w", "fake_w", "data/m.gguf", ("fake_w_part1", "fake_w_part2"))
    monkeypatch.setattr(builtin, "BUILTINS", {**BUILTINS, "fake": entry})
    monkeypatch.setenv("TORCHWELD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path


def test_parts_are_joined_once_and_nothing_is_executed(joined: Path) -> None:
    fake_package(joined / "site")
    path = find_builtin("fake")
    assert path.read_bytes() == b"abcdef"
    assert path.parent == joined / "cache" and (path.parent.stat().st_mode & 0o777) == 0o700
    made = path.stat().st_mtime_ns
    assert find_builtin("fake") == path and path.stat().st_mtime_ns == made
    path.write_bytes(b"torn")  # another size: joined again
    assert find_builtin("fake").read_bytes() == b"abcdef"


def test_wrong_digest_leaves_nothing(joined: Path) -> None:
    fake_package(joined / "site", digest="0" * 64)
    with pytest.raises(ModelFileError, match="wrong SHA-256"):
        find_builtin("fake")
    assert [path.name for path in (joined / "cache").iterdir() if path.suffix != ".lock"] == []


def test_missing_package_and_part(joined: Path) -> None:
    with pytest.raises(ModelFileError, match="pip install fake-w"):
        find_builtin("fake")
    fake_package(joined / "site")
    (joined / "site" / "fake_w_part2" / "data" / "m.gguf.part01").unlink()
    with pytest.raises(ModelFileError, match=r"missing.*pip install --force-reinstall fake-w"):
        find_builtin("fake")


def test_cache_folder_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHWELD_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(ModelFileError, match="others can write"):
        cache_folder()
    monkeypatch.setenv("TORCHWELD_CACHE_DIR", str(write_file(tmp_path / "file", b"") / "below"))
    with pytest.raises(ModelFileError, match="cannot be made"):
        cache_folder()


MEASURE = """
import sys, torch, torchweld.models.load as load
def peak():  # not ru_maxrss, which starts at the peak of the process that forked this one
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
before = peak()
path = load.load_model(sys.argv[1]).path
print((peak() - before) / path.stat().st_size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_memory_stays_below_one_and_a_half_files(name: str) -> None:
    find_builtin(name)  # joined outside the measurement
    run = subprocess.run([sys.executable, "-c", MEASURE, name], capture_output=True, text=True, check=True)
    assert 0.5 < float(run.stdout) < 1.5
