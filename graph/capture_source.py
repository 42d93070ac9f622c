"""Source lines for captured nodes, cheaply.

torch.fx symbolizes the whole Python stack for every node (a third of the time of a capture), then keeps only
frames called `forward`, so that plain functions have no source at all. Here the live frames are walked
instead and only the user's own are written down.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Iterator

from torch import fx
from torch.fx.proxy import TracerBase

from torchweld.graph.program import is_machinery


def user_trace(boundary: str) -> str:
    """The live stack as text, outermost frame first: frames outside torch, up to the first in file
    `boundary`."""
    lines = []
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename != boundary:
        code = frame.f_code
        if not is_machinery(code.co_filename):
            source = linecache.getline(code.co_filename, frame.f_lineno).strip()
            lines.append(
                f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n    {source}\n'
            )
        frame = frame.f_back
    return "".join(reversed(lines))


@contextlib.contextmanager
def record_sources(boundary: str) -> Iterator[None]:
    """Within this context every node that a tracer makes gets `user_trace(boundary)` as its stack trace."""
    original = TracerBase.create_node

    def create_node(self: TracerBase, *args: object, **kwargs: object) -> fx.Node:
        node = original(self, *args, **kwargs)  # type: ignore[arg-type]
        if node.op == "call_function" and (trace := user_trace(boundary)):
            node.meta["stack_trace"] = trace
        return node

    emit, fx.config.do_not_emit_stack_traces = fx.config.do_not_emit_stack_traces, True
    TracerBase.create_node = create_node  # type: ignore[method-assign]
    try:
        yield
    finally:
        TracerBase.create_node = original  # type: ignore[method-assign]
        fx.config.do_not_emit_stack_traces = emit
