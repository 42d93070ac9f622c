"""One door for every model: a built-in name, GGUF file, Hugging Face folder, .pt2, file.py:factory.

The first three are data. A `.pt2` (torch.export.load) and a Python file are code: load them only from
people whose programs you would run.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from torchweld.models.bert import Bert, SentenceEncoder
from torchweld.models.builtin import BUILTINS, find_builtin
from torchweld.models.errors import ModelFileError
from torchweld.models.from_folder import FOLDER_BUILDERS, folder_architecture, model_from_folder
from torchweld.models.from_gguf import GGUF_BUILDERS, architecture_of, model_from_gguf
from torchweld.models.gguf import read_gguf
from torchweld.models.layers import StoredEmbedding
from torchweld.models.safetensors import read_config
from torchweld.models.tokenizer import Tokenizer, tokenizer_from_folder
from torchweld.models.tokenizer_gguf import tokenizer_from_gguf

Kind = Literal["decoder", "encoder", "other"]
_EXAMPLE_SIZE = (2, 8)  # neither 0 nor 1, which capture would take for constants


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode and what is known about it.

    example_inputs: positional arguments, e.g. ids int64 [2, 8]; empty where a factory gives none.
    kind: "decoder" (ids -> logits), "encoder" (ids, attention mask -> hidden states or vectors) or "other".
    """

    module: nn.Module
    tokenizer: Tokenizer | None
    example_inputs: tuple[Tensor, ...]
    name: str
    architecture: str
    path: Path
    kind: Kind


def load_model(spec: str) -> LoadedModel:
    """Load MODEL: a built-in name, a GGUF file, a Hugging Face folder, a .pt2 or file.py:factory.

    Weights are views of the file in their stored format. Raises ModelFileError, one line, for anything else.
    """
    if spec in BUILTINS:
        return _load_path(find_builtin(spec), spec)
    file, colon, factory = spec.rpartition(":")
    if colon and file.endswith(".py"):
        return _load_factory(Path(file), factory)
    path = Path(spec)
    if not path.exists():
        near = difflib.get_close_matches(spec, BUILTINS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else ""
        expected = "a GGUF file, a Hugging Face folder, a .pt2, file.py:factory or a built-in name"
        raise ModelFileError(spec, "no such model", f"{expected} ({', '.join(BUILTINS)})", hint)
    return _load_path(path, path.stem if path.is_file() else path.resolve().name)


def _load_path(path: Path, name: str) -> LoadedModel:
    if path.is_dir():
        return _load_folder(path, name)
    if path.suffix == ".pt2":
        return _load_exported(path, name)
    if path.suffix == ".py":
        raise ModelFileError(path, "names no factory", f"{path}:FUNCTION, a function that returns the model")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise ModelFileError(path, "is a pickle", "safetensors or GGUF", "convert it first")
    return _load_gguf(path, name)


def _load_gguf(path: Path, name: str) -> LoadedModel:
    file = read_gguf(path)
    architecture = architecture_of(file)
    module = model_from_gguf(file)
    return _finish(module, tokenizer_from_gguf(file), name, architecture, path)


def _load_folder(path: Path, name: str) -> LoadedModel:
    config = read_config(path)
    architecture = folder_architecture(config)
    module = model_from_folder(path)
    return _finish(module, tokenizer_from_folder(path, config), name, architecture, path)


def _finish(
    module: nn.Module, tokenizer: Tokenizer | None, name: str, architecture: str, path: Path
) -> LoadedModel:
    kind: Kind = "encoder" if isinstance(module, Bert | SentenceEncoder) else "decoder"
    words = next(part for part in module.modules() if isinstance(part, StoredEmbedding))
    ids = torch.arange(_EXAMPLE_SIZE[0] * _EXAMPLE_SIZE[1]).reshape(_EXAMPLE_SIZE) % words.weight.shape[0]
    examples = (ids, torch.ones_like(ids)) if kind == "encoder" else (ids,)
    return LoadedModel(module.eval(), tokenizer, examples, name, architecture, path, kind)


def _load_exported(path: Path, name: str) -> LoadedModel:
    try:
        program = torch.export.load(path)
    except Exception as error:  # a damaged archive surfaces as almost any exception
        what = f"is not an exported program ({error})"
        raise ModelFileError(path, what, "a file of torch.export.save") from None
    args = program.example_inputs[0] if program.example_inputs else ()
    examples = tuple(arg for arg in args if isinstance(arg, Tensor))
    return LoadedModel(program.module(), None, examples, name, "exported program", path, "other")


def _load_factory(path: Path, factory: str) -> LoadedModel:
    """Run FILE and call FACTORY: it returns a module, or a module and a tuple of example tensors."""
    place = f"{path}:{factory}"
    try:
        result = _find_factory(path, factory)()
    except ModelFileError:
        raise
    except Exception as error:  # the user's function may raise anything
        raise ModelFileError(place, f"raised {type(error).__name__}: {error}") from error
    module, examples = result if isinstance(result, tuple) and len(result) == 2 else (result, ())
    if not isinstance(module, nn.Module):
        raise ModelFileError(place, f"returned a {type(module).__name__}", "a Module, or (Module, inputs)")
    if not isinstance(examples, tuple) or not all(isinstance(example, Tensor) for example in examples):
        raise ModelFileError(place, "returned example inputs that are not tensors", "a tuple of tensors")
    return LoadedModel(module.eval(), None, examples, factory, type(module).__name__, path, "other")


def _find_factory(path: Path, factory: str) -> Callable[[], object]:
    if not path.is_file():
        raise ModelFileError(path, "no such file", "a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ModelFileError(path, "cannot be imported", "a Python file")
    imported = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(imported)
    except Exception as error:  # the user's file may raise anything
        raise ModelFileError(path, f"raised {type(error).__name__} on import: {error}") from error
    found = getattr(imported, factory, None)
    if not callable(found):
        names = [name for name, value in vars(imported).items() if callable(value)]
        near = difflib.get_close_matches(factory, names, n=1, cutoff=0.0)
        raise ModelFileError(
            path, f"has no function {factory!r}", "a factory", f"did you mean {near[0]!r}?" if near else ""
        )
    return found  # type: ignore[no-any-return]


def supported_architectures() -> tuple[str, ...]:
    """Architectures that load_model reads, as GGUF names and as Hugging Face model types."""
    return tuple(sorted({*GGUF_BUILDERS, *FOLDER_BUILDERS}))
