"""Kernels written by hand in the kernel IR: what the printers and the interpreter are tested on without lowering."""

from __future__ import annotations

import torch
from sympy import Integer

from torchweld.codegen.ir import (
    AttentionPart,
    Bind,
    Buffer,
    Indirect,
    Kernel,
    MatmulPart,
    RowPart,
    Store,
    size_symbol,
)
from torchweld.graph.index import ZERO, FloorDiv
from torchweld.graph.terms import (
    Attend,
    Axis,
    Const,
    Contract,
    Decode,
    Fold,
    Guard,
    IndexValue,
    Load,
    Monoid,
    Ref,
    cast,
    op,
)

F32 = torch.float32
B, S = size_symbol("B"), size_symbol("S")


def _axis(name: str, extent: object) -> Axis:
    return Axis(name, Integer(extent) if isinstance(extent, int) else extent)


def add_relu_broadcast(dtype: torch.dtype = F32) -> Kernel:
    """y[b,s,d] = relu(x[b,s,d] + bias[d])."""
    b, s, d = _axis("b", B), _axis("s", S), _axis("d", 13)
    x = cast(Load(dtype, "x", (b.symbol, s.symbol, d.symbol)), F32)
    bias = Load(F32, "bias", (d.symbol,))
    value = op("relu", op("add", x, bias))
    part = RowPart((b, s), (d,), (), (Store("y", (b.symbol, s.symbol, d.symbol), value),))
    return Kernel(
        "add_relu",
        (Buffer("x", dtype, (B, S, Integer(13)), "input"), Buffer("bias", F32, (Integer(13),), "weight"),
         Buffer("y", dtype, (B, S, Integer(13)), "output")),
        ("B", "S"), (part,), ops=("aten.add", "aten.relu"),
    )  # fmt: skip


def rms_norm(width: int = 33) -> Kernel:
    """y = x * rsqrt(mean(x^2) + eps) * w, and a second output x + x in the same part."""
    b, s, d, k = _axis("b", B), _axis("s", S), _axis("d", width), _axis("k", width)
    xk = Load(F32, "x", (b.symbol, s.symbol, k.symbol))
    square_sum = Fold(F32, Monoid("sum"), (k,), op("mul", xk, xk))
    mean = op("div", square_sum, Const(F32, float(width)))
    bind = Bind("inv_rms", op("rsqrt", op("add", mean, Const(F32, 1e-6))))
    x = Load(F32, "x", (b.symbol, s.symbol, d.symbol))
    y = op("mul", op("mul", x, Ref(F32, "inv_rms")), Load(F32, "w", (d.symbol,)))
    at = (b.symbol, s.symbol, d.symbol)
    part = RowPart((b, s), (d,), (bind,), (Store("y", at, y), Store("twice", at, op("add", x, x))))
    shape = (B, S, Integer(width))
    return Kernel(
        "rms_norm",
        (Buffer("x", F32, shape, "input"), Buffer("w", F32, (Integer(width),), "weight"),
         Buffer("y", F32, shape, "output"), Buffer("twice", F32, shape, "output")),
        ("B", "S"), (part,), ops=("aten.rms_norm", "aten.add"),
    )  # fmt: skip


def softmax_argmax(width: int = 37) -> Kernel:
    """Two parts with grids of their own: a softmax over d, and an argmax over d of another input."""
    b, d, k, j = _axis("b", B), _axis("d", width), _axis("k", width), _axis("j", width)
    top = Bind("top", Fold(F32, Monoid("max"), (k,), Load(F32, "x", (b.symbol, k.symbol))))
    total = Bind(
        "total",
        Fold(
            F32,
            Monoid("sum"),
            (j,),
            op("exp", op("sub", Load(F32, "x", (b.symbol, j.symbol)), Ref(F32, "top"))),
        ),
    )
    x = Load(F32, "x", (b.symbol, d.symbol))
    value = op("div", op("exp", op("sub", x, Ref(F32, "top"))), Ref(F32, "total"))
    soft = RowPart((b,), (d,), (top, total), (Store("p", (b.symbol, d.symbol), value),))
    r, c = _axis("r", S), _axis("c", width)
    best = Bind("best", Fold(torch.int64, Monoid("argmax"), (c,), Load(F32, "z", (r.symbol, c.symbol))))
    arg = RowPart((r,), (), (best,), (Store("i", (r.symbol,), Ref(torch.int64, "best")),))
    return Kernel(
        "softmax_argmax",
        (Buffer("x", F32, (B, Integer(width)), "input"), Buffer("z", F32, (S, Integer(width)), "input"),
         Buffer("p", F32, (B, Integer(width)), "output"), Buffer("i", torch.int64, (S,), "output")),
        ("B", "S"), (soft, arg), ops=("aten.softmax", "aten.argmax"),
    )  # fmt: skip


def gather_and_concat(rows: int = 11, width: int = 5) -> Kernel:
    """y[b] = cat(table[ids[b]], -x[b]) along the features: an indirect load and guarded loads."""
    b, d = _axis("b", B), _axis("d", 2 * width)
    raw = Load(torch.int64, "ids", (b.symbol,))
    wrapped = op("where", op("lt", raw, Const(torch.int64, 0)), op("add", raw, Const(torch.int64, rows)), raw)
    i0 = _axis("i0", rows).symbol
    low = op("lt", IndexValue(torch.int64, d.symbol), Const(torch.int64, width))
    second = op("neg", Load(F32, "x", (b.symbol, d.symbol - width)))
    first = Load(F32, "table", (i0, d.symbol))
    value = Guard(F32, low, first, Guard(F32, op("not", low), second, Const(F32, 0.0)))
    part = RowPart((b,), (d,), (), (Store("y", (b.symbol, d.symbol), value),))
    return Kernel(
        "gather_concat",
        (Buffer("ids", torch.int64, (B,), "input"), Buffer("table", F32, (Integer(rows), Integer(width)), "weight"),
         Buffer("x", F32, (B, Integer(width)), "input"), Buffer("y", F32, (B, Integer(2 * width)), "output")),
        ("B",), (part,), (Indirect("i0", wrapped, Integer(rows)),), ops=("aten.embedding", "aten.neg", "aten.cat"),
    )  # fmt: skip


def norm_gated_linear(
    format: str = "Q8_0", width: int = 64, features: int = 24, row_bytes: int = 68
) -> Kernel:
    """y = silu(n @ gate.T) * (n @ up.T) + r, n = rms_norm(x); both weights stored in `format` ("F32" means dense)."""
    b, s, n = _axis("b", B), _axis("s", S), _axis("n", features)
    k, j = _axis("k", width), _axis("j", width)
    xj = Load(F32, "x", (b.symbol, s.symbol, j.symbol))
    mean = op("div", Fold(F32, Monoid("sum"), (j,), op("mul", xj, xj)), Const(F32, float(width)))
    inv = Bind("inv_rms", op("rsqrt", op("add", mean, Const(F32, 1e-6))))
    a = op("mul", Load(F32, "x", (b.symbol, s.symbol, k.symbol)), Ref(F32, "inv_rms"))
    a = op("mul", a, Load(F32, "w", (k.symbol,)))

    def weight(name: str) -> Load | Decode:
        if format == "F32":
            return Load(F32, name, (n.symbol, k.symbol))
        return Decode(F32, format, name, (n.symbol,), k.symbol)

    gate = Bind("gate_acc", Contract(F32, k, a, weight("gate")))
    up = Bind("up_acc", Contract(F32, k, a, weight("up")))
    g = Ref(F32, "gate_acc")
    at = (b.symbol, s.symbol, n.symbol)
    value = op("add", op("mul", op("mul", g, op("sigmoid", g)), Ref(F32, "up_acc")), Load(F32, "r", at))
    part = MatmulPart((), (b, s), n, (inv,), (gate, up), (Store("y", at, value),))
    if format == "F32":
        weights = tuple(Buffer(w, F32, (Integer(features), Integer(width)), "weight") for w in ("gate", "up"))
    else:
        shape = (Integer(features), Integer(row_bytes))
        weights = tuple(Buffer(w, torch.uint8, shape, "weight", format) for w in ("gate", "up"))
    return Kernel(
        "rmsnorm_gated_linear",
        (Buffer("x", F32, (B, S, Integer(width)), "input"), Buffer("w", F32, (Integer(width),), "weight"), *weights,
         Buffer("r", F32, (B, S, Integer(features)), "input"), Buffer("y", F32, (B, S, Integer(features)), "output")),
        ("B", "S"), (part,), ops=("aten.rms_norm", "aten.linear", "aten.linear", "aten.silu", "aten.mul", "aten.add"),
    )  # fmt: skip


def batched_matmul_pair() -> Kernel:
    """Two matmul parts in one kernel: c[b] = x[b] @ y[b] (batched, B operand [k, n]) and e = x[0] @ f.T + bias."""
    b, m, n, k = _axis("b", B), _axis("m", S), _axis("n", 19), _axis("k", 7)
    first = Contract(
        F32, k, Load(F32, "x", (b.symbol, m.symbol, k.symbol)), Load(F32, "y", (b.symbol, k.symbol, n.symbol))
    )
    part = MatmulPart(
        (b,),
        (m,),
        n,
        (),
        (Bind("acc", first),),
        (Store("c", (b.symbol, m.symbol, n.symbol), Ref(F32, "acc")),),
    )
    m2, n2, k2 = _axis("m2", S), _axis("n2", 17), _axis("k2", 7)
    second = Contract(
        F32, k2, Load(F32, "x", (ZERO, m2.symbol, k2.symbol)), Load(F32, "f", (n2.symbol, k2.symbol))
    )
    other = MatmulPart(
        (), (m2,), n2, (), (Bind("acc2", second),),
        (Store("e", (m2.symbol, n2.symbol), op("add", Ref(F32, "acc2"), Load(F32, "bias", (n2.symbol,)))),),
    )  # fmt: skip
    return Kernel(
        "bmm_linear",
        (Buffer("x", F32, (B, S, Integer(7)), "input"), Buffer("y", F32, (B, Integer(7), Integer(19)), "input"),
         Buffer("f", F32, (Integer(17), Integer(7)), "weight"), Buffer("bias", F32, (Integer(17),), "weight"),
         Buffer("c", F32, (B, S, Integer(19)), "output"), Buffer("e", F32, (S, Integer(17)), "output")),
        ("B", "S"), (part, other), ops=("aten.bmm", "aten.linear"),
    )  # fmt: skip


def attention(
    mask_kind: str = "causal", window: int = 0, soft_cap: float = 0.0, tensor_mask: bool = False, heads: int = 4,
    groups: int = 2, width: int = 16,
) -> Kernel:  # fmt: skip
    """Grouped-head attention over q [B,S,H*D], k, v [B,S,G*D] (heads split by index), stored as [B,S,H*D]."""
    b, h, t, f = _axis("b", B), _axis("h", heads), _axis("t", S), _axis("f", width)
    s, d = _axis("s", S), _axis("d", width)
    share = heads // groups
    group = FloorDiv(h.symbol, Integer(share))
    q = Load(F32, "q", (b.symbol, t.symbol, h.symbol * width + d.symbol))
    k = Load(F32, "k", (b.symbol, s.symbol, group * width + d.symbol))
    v = Load(F32, "v", (b.symbol, s.symbol, group * width + f.symbol))
    mask = Load(torch.bool, "mask", (b.symbol, ZERO, t.symbol, s.symbol)) if tensor_mask else None
    attend = Bind(
        "out",
        Attend(F32, s, d, q, k, v, mask, mask_kind, window, width**-0.5, soft_cap, t.symbol, S, share=share),  # type: ignore[arg-type]
    )
    store = Store("o", (b.symbol, t.symbol, h.symbol * width + f.symbol), Ref(F32, "out"))
    wide, narrow = Integer(heads * width), Integer(groups * width)
    buffers = [Buffer("q", F32, (B, S, wide), "input"), Buffer("k", F32, (B, S, narrow), "input"),
               Buffer("v", F32, (B, S, narrow), "input")]  # fmt: skip
    if tensor_mask:
        buffers.append(Buffer("mask", torch.bool, (B, Integer(1), S, S), "input"))
    buffers.append(Buffer("o", F32, (B, S, wide), "output"))
    part = AttentionPart((b, h), t, f, attend, (store,))
    return Kernel("attention", tuple(buffers), ("B", "S"), (part,), ops=("torchweld.attention",))


ALL = {
    "add_relu": add_relu_broadcast,
    "rms_norm": rms_norm,
    "softmax_argmax": softmax_argmax,
    "gather_concat": gather_and_concat,
    "norm_gated_linear_f32": lambda: norm_gated_linear("F32"),
    "norm_gated_linear_q8_0": norm_gated_linear,
    "bmm_linear": batched_matmul_pair,
    "attention_causal": attention,
    "attention_window": lambda: attention("window", 3),
    "attention_soft_cap_mask": lambda: attention("none", soft_cap=5.0, tensor_mask=True),
}
