"""One fresh process of `benchmarks.coldstart`: goes from nothing to the second token and prints what each phase took.

Run as `python -m benchmarks.coldstart_child SYSTEM MODEL PRECISION`; prints one JSON object of seconds by phase.
Imports are inside the functions because importing is what is timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Phases = dict[str, float]
PROMPT = [1500, 2500, 3500, 4500, 5500, 6500, 7500, 8500]


@contextmanager
def phase(phases: Phases, name: str) -> Iterator[None]:
    """Seconds of the block, under this name."""
    start = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - start


def ours(model: str, precision: str) -> Phases:
    """torchweld: the whole model optimized, then the derived cache and two tokens."""
    phases: Phases = {}
    with phase(phases, "import torch"):
        import torch
    with phase(phases, "import torchweld, beyond torch"):
        import torchweld
        from torchweld import capture, load_model, optimize
        from torchweld.decoding.cached import CachedModel
    from benchmarks.peers.ours import options_for

    options = options_for(precision, torch.get_num_threads())
    with phase(phases, "load"):
        loaded = load_model(model)
    with phase(phases, "capture (also a part of optimize)"):
        capture(loaded.module, loaded.example_inputs)
    with phase(phases, "optimize"):
        optimized: torchweld.OptimizedModule = optimize(loaded.module, loaded.example_inputs, options=options)
    if loaded.kind != "decoder":
        with phase(phases, "first call"):
            optimized(*loaded.example_inputs)
        return phases
    with phase(phases, "derive the cache"):
        cached = CachedModel.from_module(loaded.module, options=options)
    with phase(phases, "first token"):
        cached.prefill([PROMPT])
    with phase(phases, "second token"):
        cached.step(torch.tensor([[7]]))
    return phases


def compiled(model: str, precision: str) -> Phases:
    """torch.compile of Hugging Face's model, default mode: a prompt, and the same prompt again."""
    phases: Phases = {}
    with phase(phases, "import torch"):
        import torch
    with phase(phases, "import transformers"):
        import transformers  # noqa: F401
    from benchmarks.peers.twin import language_model, sentence_model

    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    inputs: dict[str, object]
    ids = torch.tensor([PROMPT])
    with phase(phases, "load"):
        if model.endswith("model"):  # a folder: the sentence encoder
            module, inputs = sentence_model(dtype), {"ids": ids, "mask": torch.ones_like(ids)}
        else:
            module, inputs = (
                language_model(model, dtype),
                {"input_ids": ids, "use_cache": False, "logits_to_keep": 1},
            )
    call = torch.compile(module)
    with torch.no_grad():
        with phase(phases, "optimize and first token"):
            call(**inputs)
        with phase(phases, "the same prompt again"):
            call(**inputs)
    return phases


SYSTEMS: dict[str, Callable[[str, str], Phases]] = {"torchweld": ours, "torch.compile": compiled}


def main() -> None:
    """Run the phases of one system."""
    system, model, precision = sys.argv[1:]
    phases = SYSTEMS[system](model, precision)
    sys.stdout.write("\n" + json.dumps(phases) + "\n")


if __name__ == "__main__":
    main()
