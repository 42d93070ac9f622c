"""`torchweld generate` from end to end, on a model of two layers whose folder has a tokenizer and a chat template."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn

from tests.tiny_models import tiny_model
from torchweld.decoding import generate_command
from torchweld.decoding.cli import app
from torchweld.decoding.generate import stream
from torchweld.decoding.generate_command import (
    Decoder,
    GenerateWish,
    Sampling,
    encode_prompt,
    language_tokenizer,
    recompute_model,
    run_generate,
    stream_wish,
)
from torchweld.decoding.generation import Stream
from torchweld.decoding.step_model import DecodingError
from torchweld.graph import capture_causal as capture_module
from torchweld.graph.program import Program
from torchweld.models.errors import ModelFileError
from torchweld.models.load import LoadedModel, load_model
from torchweld.optimizer.cli import run

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE(vocab={text: number for number, text in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), "utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers over bytes."""
    root = tmp_path_factory.mktemp("models")
    tiny_model(
        "llama", root, seed=1, vocab_size=258, bos_token_id=256, eos_token_id=257, max_position_embeddings=256
    )
    (found,) = root.iterdir()
    write_tokenizer(found)
    return found


@pytest.fixture
def torchweld(capsys: pytest.CaptureFixture[str], folder: Path) -> Runner:
    return Runner(capsys, folder)


class Runner:
    """`torchweld generate FOLDER ...` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder

    def __call__(self, *arguments: object) -> Done:
        self.capsys.readouterr()
        code = run(app, ["generate", str(self.folder), *map(str, arguments)])
        return Done(code, *self.capsys.readouterr())


PROMPT = ("--prompt", "abcabcabc")


def test_text_to_stdout_and_the_rest_to_stderr(torchweld: Runner) -> None:
    done = torchweld(*PROMPT, "--max-new-tokens", 12, "--recompute")
    assert done.code == 0, done
    assert done.out.endswith("\n") and len(done.out) > 1
    assert done.err.count("\n") == 1 and done.err.startswith("12 tokens, ") and "tokens/s, " in done.err
    assert done.err.endswith("no cache: every pass read the whole text\n")


def test_the_cache_is_the_rule_however_short_the_text(torchweld: Runner) -> None:
    done = torchweld(*PROMPT, "--max-new-tokens", 4)
    assert done.code == 0, done
    assert done.err.count("\n") == 1 and "no cache" not in done.err
    again = torchweld(*PROMPT, "--max-new-tokens", 4, "--recompute")
    assert again.out == done.out and "no cache" in again.err


def test_every_strategy_gives_one_text(torchweld: Runner, tmp_path: Path) -> None:
    plain = json.loads(torchweld(*PROMPT, "--tokens", 40, "--decode", "plain", "--json").out)
    assert plain["finish"] == "length" and len(plain["tokens"]) == 40
    assert plain["statistics"]["passes"] == 39 and plain["statistics"]["drafted"] == 0
    assert plain["statistics"]["gb_s"] > 0 and plain["statistics"]["read_gb_s"] > 0

    done = torchweld(*PROMPT, "--tokens", 40, "--decode", "draft", "--draft", torchweld.folder, "--json")
    assert done.code == 0, done
    drafted = json.loads(done.out)
    assert drafted["tokens"] == plain["tokens"] and drafted["statistics"]["strategy"] == "draft"

    reference, plot = tmp_path / "reference.txt", tmp_path / "accepted.svg"
    reference.write_text(plain["text"], "utf-8")
    done = torchweld(*PROMPT, "--tokens", 40, "--reference", reference, "--stats", "--plot", plot)
    assert done.code == 0 and plain["text"] in done.out
    for words in ("decoding: reference", "time to first token", "tokens/s", "GB/s", "of this machine's"):
        assert words in done.err
    assert max(map(len, done.err.splitlines())) <= 80
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")


def test_precision(torchweld: Runner) -> None:
    options = (*PROMPT, "--tokens", 8, "--decode", "plain")
    done = torchweld(*options, "--precision", "bf16", "--json")
    assert done.code == 0, done
    content = json.loads(done.out)
    assert content["statistics"]["precision"] == "bf16" and len(content["tokens"]) == 8
    done = torchweld(*options, "--precision", "bf16", "--stats")
    assert "bf16  for products with stored weights" in done.err and done.out == content["text"] + "\n"
    assert torchweld(*options, "--precision", "int8").err.endswith(", int8\n")
    assert ", int8; no cache" in torchweld(*options, "--precision", "int8", "--recompute").err


def test_f32_is_what_nobody_asks_for(torchweld: Runner) -> None:
    statistics = json.loads(torchweld(*PROMPT, "--tokens", 4, "--json").out)["statistics"]
    assert statistics["precision"] == "f32"
    assert "f32" not in torchweld(*PROMPT, "--tokens", 4).err
    eager = json.loads(torchweld(*PROMPT, "--tokens", 4, "--json", "--eager").out)["statistics"]
    assert eager["precision"] is None


def test_every_precision_starts_warm(torchweld: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*PROMPT, "--tokens", 6, "--decode", "plain", "--json")
    cold = {p: json.loads(torchweld(*options, "--precision", p).out) for p in ("f32", "bf16", "int8")}

    def capture_nothing(*args: object) -> Program:
        raise AssertionError("a warm start captures nothing")

    monkeypatch.setattr(capture_module, "capture_causal", capture_nothing)
    for precision, expected in cold.items():
        warm = json.loads(torchweld(*options, "--precision", precision).out)
        assert warm["tokens"] == expected["tokens"] and warm["statistics"]["precision"] == precision


def test_sampling_repeats_with_its_seed(folder: Path) -> None:
    loaded = load_model(str(folder))
    tokenizer = language_tokenizer(loaded, "m")
    decoder = Decoder(recompute_model(loaded.module), None, 0.0)

    def tokens(**settings: float) -> list[int]:
        wish = GenerateWish("m", "abc", max_new_tokens=16, sampling=Sampling(**settings))  # type: ignore[arg-type]
        return [piece.token for piece in stream_wish(decoder, tokenizer, [1, 2, 3], wish)]

    assert (
        tokens(seed=1, temperature=2.0) == tokens(seed=1, temperature=2.0) != tokens(seed=2, temperature=2.0)
    )
    assert tokens(seed=1) == tokens(seed=2) == tokens(temperature=0.0) == tokens(temperature=2.0, top_k=1)
    assert tokens(repetition_penalty=9.0) != tokens()


def test_when_tokens_are_drawn() -> None:
    assert not Sampling().do_sample and not Sampling(seed=3, repetition_penalty=2.0).do_sample
    assert Sampling(temperature=0.5).do_sample and Sampling(top_p=0.9).do_sample
    assert not Sampling(temperature=0.0, top_k=3).do_sample


def test_stop_string(torchweld: Runner) -> None:
    whole = json.loads(torchweld(*PROMPT, "--recompute", "--tokens", 20, "--json").out)["text"]
    stop = next(character for character in whole[1:] if character != "\ufffd")
    found = json.loads(torchweld(*PROMPT, "--recompute", "--tokens", 20, "--stop", stop, "--json").out)
    assert (found["finish"], found["stop_string"]) == ("stop", stop)
    assert found["text"] == whole[: whole.index(stop)]


def test_chat(folder: Path) -> None:
    tokenizer = language_tokenizer(load_model(str(folder)), str(folder))
    ids = encode_prompt(tokenizer, GenerateWish("m", "Hi", chat=True, system="Be brief."))
    text = "".join(tokenizer.core.id_to_token(number) or "?" for number in ids)
    assert text == "<s>system:BeĠbrief.</s><s>user:Hi</s><s>"
    with pytest.raises(DecodingError, match="expected --chat"):
        encode_prompt(tokenizer, GenerateWish("m", "Hi", system="Be brief."))


def test_prompt_from_stdin(torchweld: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--tokens", 4, "--recompute", "--json")
    typed = json.loads(torchweld(*PROMPT, *options).out)
    monkeypatch.setattr("sys.stdin", io.StringIO("abcabcabc"))
    assert json.loads(torchweld("--prompt", "-", *options).out)["tokens"] == typed["tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--decode", "lookaheat"), "'lookahead'"),
        (("--decode", "medusa"), "--heads FILE"),
        (("--decode", "medusa", "--heads", "none.safetensors"), "none.safetensors"),
        (("--decode", "plain", "--reference", "none.txt"), "--reference is for --decode auto or lookup"),
        (("--reference", "none.txt"), "none.txt: No such file"),
        (("--draft", "smollm2"), "--draft is for --decode draft"),
        (("--decode", "draft", "--recompute"), "--decode draft needs the cache"),
        (("--precision", "int4"), "unknown precision 'int4'; the nearest valid one is 'int8'"),
        (("--precision", "bf16", "--eager"), "expected f32 with --eager"),
        (("--top-p", "2"), "--top-p"),
        (("--top-p", "0", "--recompute"), "top_p is 0.0"),
        (("--stop", "", "--recompute"), "an empty stop string"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--system", "x"), "expected --chat"),
        (("--prompt", ""), "prompt: has no tokens"),
        (("--prompt", "\udcff"), "half a surrogate pair"),
    ],
)
def test_refusals_are_one_line(torchweld: Runner, arguments: tuple[str, ...], words: str) -> None:
    prompt = () if "--prompt" in arguments else PROMPT
    done = torchweld(*prompt, *arguments)
    assert done.code == 2 and done.out == "", done
    assert done.err.count("\n") == 1 and words in done.err, done.err


def test_reference_that_is_no_text(torchweld: Runner, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"abc\xff")
    done = torchweld(*PROMPT, "--reference", tmp_path / "binary")
    assert done.code == 2 and "is no UTF-8 text (byte 3)" in done.err and done.err.count("\n") == 1


class Interrupted(io.StringIO):
    """A terminal at which somebody presses Ctrl-C after a few pieces of text."""

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.pieces == 0 and text != "\n":
            raise KeyboardInterrupt
        self.pieces -= 1
        return super().write(text)


def test_ctrl_c_ends_the_text_and_not_the_report(folder: Path) -> None:
    out, error = Interrupted(3), io.StringIO()
    finished = run_generate(GenerateWish(str(folder), "abc", max_new_tokens=50, cache=False), out, error)
    assert not finished
    assert out.getvalue().endswith("\n") and out.getvalue().count("\n") == 1
    assert error.getvalue().count("\n") == 1 and " tokens, " in error.getvalue()


def test_ctrl_c_has_its_exit_code(torchweld: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(pieces: Stream, out: object) -> bool:
        next(pieces)
        pieces.close()
        return False

    monkeypatch.setattr(generate_command, "_write_all", interrupt)
    assert torchweld(*PROMPT, "--recompute").code == 130


def test_control_characters_do_not_reach_a_terminal(folder: Path) -> None:
    tokenizer = language_tokenizer(load_model(str(folder)), "m")
    escape = tokenizer.encode("\x1b")[0]

    def model(ids: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.full_like(ids, escape), 258).float()

    for out, expected in ((Interrupted(9), "\ufffd\ufffd\n"), (io.StringIO(), "\x1b\x1b\n")):
        pieces = stream(recompute_model(model), [1], tokenizer=tokenizer, max_new_tokens=2)
        assert generate_command._write_all(pieces, out)
        assert out.getvalue() == expected


def test_a_model_without_logits() -> None:
    with pytest.raises(DecodingError, match="returns a tuple; expected a tensor of logits"):
        recompute_model(lambda ids: (ids,))


def test_only_language_models_complete() -> None:
    path = Path("m")
    encoder = LoadedModel(nn.Identity(), None, (), "m", "bert", path, "encoder")
    with pytest.raises(ModelFileError, match="is a bert encoder; expected a language model"):
        language_tokenizer(encoder, "m")
    mute = LoadedModel(nn.Identity(), None, (), "m", "llama", path, "decoder")
    with pytest.raises(ModelFileError, match="has no tokenizer"):
        language_tokenizer(mute, "m")
