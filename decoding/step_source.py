"""Where the compiled step of a causal model comes from: the plans of earlier runs, or capture, derivation and fusion.

    source = StepSource.of_module(llama, options=options)
    step, compiled = source.compiled(is_tree=False)

Nothing is captured before something needs it, and then once: a step that is kept (optimizer/warm_step.py) needs no
graph at all. So what captures and derives is imported where it is used: it would be a fifth of a warm start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from torchweld.graph.program import Program
from torchweld.graph.rewrite import Refusal
from torchweld.optimizer.compile import Compiled, Options
from torchweld.optimizer.compile_step import TYPICAL_PAST, compile_step, normalise
from torchweld.optimizer.warm_step import StepStart, find_step_start
from torchweld.passes.step_program import StepProgram

log = logging.getLogger(__name__)


class NotDecodable(ValueError):
    """No cache can be derived from this program: names the node, its op and its source line, and why."""

    def __init__(self, name: str, refusal: Refusal) -> None:
        from torchweld.graph.sequence import describe_refusal

        super().__init__(f"{name} does not decode with a cache: {describe_refusal(refusal)}")
        self.refusal = refusal


def normalised(program: Program) -> Program:
    """A copy of `program` in the spelling that `derive_step` reads; see `optimizer.compile_step.normalise`."""
    return normalise(program)[0]


def derive(program: Program, tokens: str | None = None) -> StepProgram:
    """The step program of a captured program; tokens: as for CachedModel. Raises NotDecodable."""
    from torchweld.passes.rewrite_kv_cache import derive_step

    step = derive_step(normalised(program), tokens)
    if isinstance(step, Refusal):
        raise NotDecodable(program.name, step)
    return step


Phase = Callable[[str], AbstractContextManager[object]]
"""Shows what is going on while it takes long: `with phase("capture"): ...`"""


def _in_silence(name: str) -> AbstractContextManager[object]:
    return nullcontext()


class StepSource:
    """The step of one model, for rows and for trees, with the options that it is compiled with.

    program: captures the model when it is called; called at most once.  find_start: where the compiled step for rows
    (False) or for trees (True) is kept; None where it is not.  tokens: as for CachedModel.
    """

    def __init__(
        self,
        program: Callable[[], Program],
        options: Options | None = None,
        find_start: Callable[[bool], StepStart | None] = lambda is_tree: None,
        phase: Phase = _in_silence,
        *,
        tokens: str | None = None,
    ) -> None:
        self.options, self._tokens = options or Options(), tokens
        self._capture, self._find_start, self._phase = program, find_start, phase
        self._program: Program | None = None
        self._step: StepProgram | None = None
        self._looked_at: frozenset[str] = frozenset()

    @classmethod
    def of_module(
        cls,
        model: nn.Module,
        example: Tensor | Mapping[str, Tensor] | None = None,
        options: Options | None = None,
        phase: Phase = _in_silence,
        *,
        tokens: str | None = None,
    ) -> StepSource:
        """Of a model and tokens that it accepts; see `capture_causal`."""
        chosen = options or Options()

        def find_start(is_tree: bool) -> StepStart | None:
            if isinstance(example, Mapping):
                return None
            return find_step_start(model, (example,), chosen, (TYPICAL_PAST, is_tree, tokens, "choices"))

        def captured() -> Program:
            from torchweld.graph.capture_causal import capture_causal

            return capture_causal(model, example)

        return cls(captured, chosen, find_start, phase, tokens=tokens)

    @property
    def is_captured(self) -> bool:
        """Did anything need the graph so far?"""
        return self._program is not None

    @property
    def program(self) -> Program:
        """The captured program. Raises CaptureError."""
        if self._program is None:
            with self._phase("capture"):
                self._program = self._capture()
        return self._program

    def compiled(self, *, is_tree: bool) -> tuple[StepProgram, Compiled]:
        """The step and its executable; a step from the cache is a signature without its graph.

        Raises CaptureError and NotDecodable, also for a model whose inputs are no tokens.
        """
        start = self._find_start(is_tree)
        if start is not None:
            with self._phase("load the kernels of"):
                known = start.restore()
            if known is not None:
                return known
        from torchweld.graph.sequence import describe_refusal
        from torchweld.passes.rewrite_kv_cache import with_tree
        from torchweld.passes.step_choice import with_choices

        program = self.program
        with nullcontext() if start is None else start.reads(self._looked_at):
            with self._phase("derive the cache of"):
                plain = self._derived(program)
                step = with_tree(plain) if is_tree else plain
                choosing = with_choices(step)
                if isinstance(choosing, Refusal):
                    log.info("%s gives logits only: %s", program.name, describe_refusal(choosing))
                else:
                    step = choosing
            with self._phase("compile"):
                compiled = compile_step(step, self.options)
        if start is not None:
            self._looked_at = start.looked_at
            start.store(step, compiled)
        return step, compiled

    def _derived(self, program: Program) -> StepProgram:
        if self._step is None:
            step = derive(program, self._tokens)
            if step.program.fake_inputs[0].dtype != torch.int64:  # type: ignore[attr-defined]
                refusal = Refusal("the input holds no tokens (int64)", step.program.placeholders[0])
                raise NotDecodable(program.name, refusal)
            self._step = step
        return self._step
