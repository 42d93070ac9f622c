"""Pieces of transformers for random programs, so that every kind of fusion has something to fuse.

Each function reads the residual stream [batch, tokens, width] and either writes it or leaves values behind.
Sizes of batch and tokens are passed as `Size`, so these pieces also build symbolic programs.
vertical: chains, norm -> linear, naive attention; horizontal: independent work on q and k; input: siblings of
one tensor, several statistics; output: cat, stack, sums of linears, residual adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from tests.generators.builder import Builder, Rejected, Value
from tests.generators.tensors import TensorSpec

# Importing the files defines torch.ops.torchweld.*.
from torchweld.graph.formats import get_format
from torchweld.graph.ops import attention as _attention  # noqa: F401
from torchweld.graph.ops import dequantize as _dequantize  # noqa: F401
from torchweld.graph.ops import rope as _rope  # noqa: F401

aten = torch.ops.aten
own = torch.ops.torchweld
STORED_FORMATS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


def linear(b: Builder, x: Value, features: int, *, bias: bool | None = None) -> Value:
    """Add linear(x) with a new weight [features, x.shape[-1]]; the bias is drawn if None."""
    weight = b.weight(features, x.shape[-1], dtype=x.dtype)
    if not (b.chance(30) if bias is None else bias):
        return b.call("linear", aten.linear.default, x, weight)
    return b.call(
        "linear_bias", aten.linear.default, x, weight, b.weight(features, low=-1, high=1, dtype=x.dtype)
    )


def norm(b: Builder, x: Value) -> Value:
    """Add an RMS or layer norm of x over its last dimension, as one operation or spelled out."""
    size = x.shape[-1]
    kind = b.pick("rms_norm", "layer_norm", "spelled", "upcast")
    weight = b.weight(size, low=0.5, high=1.5, dtype=x.dtype)
    if kind == "rms_norm":
        return b.call("rms_norm", aten.rms_norm.default, x, [size], weight, 1e-5)
    if kind == "layer_norm":
        bias = b.weight(size, low=-0.5, high=0.5, dtype=x.dtype)
        return b.call("layer_norm", aten.layer_norm.default, x, [size], weight, bias, 1e-5)
    wide = (
        b.call("to_copy", aten._to_copy.default, x, dtype=torch.float32, exact=x.exact)
        if kind == "upcast"
        else x
    )
    square = b.call("square", aten.pow.Tensor_Scalar, wide, 2)
    mean = b.call("mean", aten.mean.dim, square, [-1], True)
    scale = b.call("rsqrt", aten.rsqrt.default, b.call("add_scalar", aten.add.Tensor, mean, 1e-5))
    scaled = b.call("mul", aten.mul.Tensor, wide, scale)
    if kind == "upcast" and x.dtype != torch.float32:
        scaled = b.call("to_copy", aten._to_copy.default, scaled, dtype=x.dtype)
    return b.call("mul", aten.mul.Tensor, weight, scaled)


def _activation(b: Builder, x: Value) -> Value:
    kind, target = b.pick(
        ("silu", aten.silu.default), ("gelu", aten.gelu.default), ("relu", aten.relu.default),
        ("sigmoid", aten.sigmoid.default), ("tanh", aten.tanh.default),
    )  # fmt: skip
    return b.call(kind, target, x)


def _residual(b: Builder, update: Value) -> None:
    b.stream = b.call("add", aten.add.Tensor, *b.pick((b.stream, update), (update, b.stream)))


def gated_mlp(b: Builder) -> None:
    """stream += down(act(gate(n)) * up(n)) with n = norm(stream)."""
    n, features = norm(b, b.stream), b.size(2)
    gate, up = linear(b, n, features), linear(b, n, features)
    product = b.call("mul", aten.mul.Tensor, _activation(b, gate), up)
    _residual(b, linear(b, product, b.width))


def split_gated_mlp(b: Builder) -> None:
    """stream += down(act(g) * u) where g, u are the halves of one linear."""
    features = b.size(2)
    both = linear(b, norm(b, b.stream), 2 * features)
    gate, up = b.call_many("split", aten.split.Tensor, both, features, -1)
    _residual(b, linear(b, b.call("mul", aten.mul.Tensor, _activation(b, gate), up), b.width))


def plain_mlp(b: Builder) -> None:
    """stream += down(gelu(up(stream))) with matrices stored the other way round, as GPT-2 stores them."""
    features = b.size(2)
    rows = b.call("reshape", aten.reshape.default, b.stream, [-1, b.width], exact=b.stream.exact)
    up = b.weight(b.width, features, dtype=b.stream.dtype, low=-0.3, high=0.3)
    hidden = b.call(
        "addmm", aten.addmm.default, b.weight(features, low=-1, high=1, dtype=b.stream.dtype), rows, up
    )
    active = b.call("gelu_tanh", aten.gelu.default, hidden, approximate="tanh")
    out = linear(b, active, b.width)
    _residual(b, b.call("reshape", aten.reshape.default, out, [b.batch, b.tokens, b.width]))


def _heads(b: Builder, x: Value, heads: int) -> Value:
    x = b.call("reshape", aten.reshape.default, x, [b.batch, b.tokens, heads, b.head_width])
    if b.chance(30):
        return b.call("permute", aten.permute.default, x, [0, 2, 1, 3])
    return b.call("transpose", aten.transpose.int, x, 1, 2)


def _rotary_table(b: Builder) -> tuple[Value, Value]:
    """cos and sin [tokens, head_width], computed from arange as models do."""
    positions = b.call("arange", aten.arange.default, b.tokens, exact=True)
    column = b.call("unsqueeze", aten.unsqueeze.default, positions, 1, exact=True)
    frequencies = b.weight(b.head_width // 2, low=0.01, high=1.0, dtype=torch.float32)
    angles = b.call("mul", aten.mul.Tensor, column, frequencies)
    both = b.call("cat", aten.cat.default, [angles, angles], -1)
    cos, sin = b.call("cos", aten.cos.default, both), b.call("sin", aten.sin.default, both)
    if b.dtype == torch.float32:
        return cos, sin
    narrow = [b.call("to_copy", aten._to_copy.default, table, dtype=b.dtype) for table in (cos, sin)]
    return narrow[0], narrow[1]


def _rotate(b: Builder, x: Value, cos: Value, sin: Value, as_operation: bool) -> Value:
    if as_operation:
        return b.call("rope", own.rope.default, x, cos, sin, b.pick(False, True))
    half = b.head_width // 2
    first = b.call("slice", aten.slice.Tensor, x, -1, 0, half)
    second = b.call("slice", aten.slice.Tensor, x, -1, half, 2**63 - 1)
    turned = b.call("cat", aten.cat.default, [b.call("neg", aten.neg.default, second), first], -1)
    straight = b.call("mul", aten.mul.Tensor, x, cos)
    return b.call("add", aten.add.Tensor, straight, b.call("mul", aten.mul.Tensor, turned, sin))


def _causal_mask(b: Builder) -> Value:
    """bool [tokens, tokens], True where the key is not later than the query, from two aranges."""
    positions = b.call("arange", aten.arange.default, b.tokens, exact=True)
    query = b.call("unsqueeze", aten.unsqueeze.default, positions, 1, exact=True)
    return b.call("le_tensor", aten.le.Tensor, positions, query, exact=True)


def _attend(b: Builder, q: Value, k: Value, v: Value) -> Value:
    kind = b.pick("causal", "full", "mask", "bias", "naive", "own", "own")
    grouped = b.kv_heads != b.heads
    scale = b.head_width**-0.5
    if kind == "own":
        mask_kind, window = b.pick(("causal", 0), ("none", 0), ("window", 2))
        cap = b.pick(0.0, 5.0)
        return b.call("attention", own.attention.default, q, k, v, None, mask_kind, window, scale, cap)
    if kind == "naive":
        return _naive_attention(b, q, _repeat(b, k), _repeat(b, v))
    attention = aten.scaled_dot_product_attention.default
    if kind in ("causal", "full"):
        return b.call(f"sdpa_{kind}", attention, q, k, v, None, 0.0, kind == "causal", enable_gqa=grouped)
    mask = _causal_mask(b)
    if kind == "bias":
        zero = b.call("full", aten.full.default, [], 0.0, dtype=b.dtype, exact=True)
        hidden = b.call("full", aten.full.default, [], -10.0, dtype=b.dtype, exact=True)
        mask = b.call("where", aten.where.self, mask, zero, hidden, exact=True)
    return b.call(f"sdpa_{kind}", attention, q, k, v, mask, 0.0, False, scale=scale, enable_gqa=grouped)


def _repeat(b: Builder, x: Value) -> Value:
    """Repeat keys or values for each query head of a group, as `repeat_kv` does."""
    times = b.heads // b.kv_heads
    if times == 1:
        return x
    x = b.call("unsqueeze", aten.unsqueeze.default, x, 2)
    x = b.call("expand", aten.expand.default, x, [b.batch, b.kv_heads, times, b.tokens, b.head_width])
    return b.call("reshape", aten.reshape.default, x, [b.batch, b.heads, b.tokens, b.head_width])


def _naive_attention(b: Builder, q: Value, k: Value, v: Value) -> Value:
    scores = b.call("matmul", aten.matmul.default, q, b.call("transpose", aten.transpose.int, k, 2, 3))
    scores = b.call("mul_scalar", aten.mul.Tensor, scores, b.head_width**-0.5)
    if b.chance(30):
        cut = b.call("tanh", aten.tanh.default, b.call("div_scalar", aten.div.Tensor, scores, 5.0))
        scores = b.call("mul_scalar", aten.mul.Tensor, cut, 5.0)
    if b.chance(60):
        later = b.call("logical_not", aten.logical_not.default, _causal_mask(b), exact=True)
        scores = b.call("masked_fill", aten.masked_fill.Scalar, scores, later, -100.0)
    weights = b.call("softmax", aten.softmax.int, scores, -1)
    return b.call("matmul", aten.matmul.default, weights, v)


def attention(b: Builder) -> None:
    """stream += o(attend(q, k, v)) with grouped heads, rotary positions and any spelling of the softmax."""
    n = norm(b, b.stream)
    widths = b.heads * b.head_width, b.kv_heads * b.head_width
    q, k, v = linear(b, n, widths[0]), linear(b, n, widths[1]), linear(b, n, widths[1])
    q, k, v = _heads(b, q, b.heads), _heads(b, k, b.kv_heads), _heads(b, v, b.kv_heads)
    if b.head_width % 2 == 0 and b.chance(60):
        cos, sin = _rotary_table(b)
        as_operation = b.chance(50)
        q, k = _rotate(b, q, cos, sin, as_operation), _rotate(b, k, cos, sin, as_operation)
    y = b.call("transpose", aten.transpose.int, _attend(b, q, k, v), 1, 2)
    y = b.call("reshape", aten.reshape.default, y, [b.batch, b.tokens, b.width])
    _residual(b, linear(b, y, b.width))


def pointwise_chain(b: Builder) -> None:
    """A chain of activations, scalings and channel weights, some of which read the start again."""
    x = b.stream
    for _ in range(b.pick(2, 3, 5)):
        step = b.pick("activation", "scale", "channel", "again")
        if step == "activation":
            x = _activation(b, x)
        elif step == "scale":
            x = b.call("mul_scalar", aten.mul.Tensor, x, b.pick(0.5, 1.5))
        elif step == "channel":
            x = b.call("mul", aten.mul.Tensor, x, b.weight(b.width, low=0.5, high=1.5, dtype=x.dtype))
        else:
            x = b.call("sub", aten.sub.Tensor, x, b.stream)
    b.stream = x


def siblings(b: Builder) -> None:
    """Two or three linears of one tensor, each used for itself (nothing may be assumed about what
    follows)."""
    x = b.pick(b.stream, norm(b, b.stream))
    for _ in range(b.pick(2, 3)):
        _activation(b, linear(b, x, b.size()))


def cat_producers(b: Builder) -> None:
    """stream = linear(cat(several results, ...))."""
    parts = [_activation(b, b.stream), linear(b, b.stream, b.size())]
    if b.chance(50):
        parts.append(b.call("slice", aten.slice.Tensor, b.stream, -1, 0, 1 + b.width // 2))
    joined = b.call("cat", aten.cat.default, parts, -1)
    b.stream = linear(b, joined, b.width) if b.chance(70) else b.stream


def linear_sum(b: Builder) -> None:
    """stream = linear(a) + linear(b): one accumulation over two contractions."""
    first, second = b.stream, _activation(b, b.stream)
    b.stream = b.call("add", aten.add.Tensor, linear(b, first, b.width), linear(b, second, b.width))


def statistics(b: Builder) -> None:
    """A softmax spelled with two statistics, or mean and variance of one tensor."""
    x = b.stream
    if b.chance(50):
        mean = b.call("mean", aten.mean.dim, x, [-1], True)
        variance = b.call("var", aten.var.correction, x, [-1], correction=0, keepdim=True)
        scale = b.call("rsqrt", aten.rsqrt.default, b.call("add_scalar", aten.add.Tensor, variance, 0.1))
        b.stream = b.call("mul", aten.mul.Tensor, b.call("sub", aten.sub.Tensor, x, mean), scale)
        return
    top = b.call("amax", aten.amax.default, x, [-1], True, exact=x.exact)
    grown = b.call("exp", aten.exp.default, b.call("sub", aten.sub.Tensor, x, top))
    total = b.call("sum", aten.sum.dim_IntList, grown, [-1], True)
    b.call("div", aten.div.Tensor, grown, total)


def independent_work(b: Builder) -> None:
    """Norms of two linears of different width, then both stacked or left alone: nothing ties them
    together."""
    n = norm(b, b.stream)
    wide, narrow = linear(b, n, b.size()), linear(b, n, b.size())
    results = [_activation(b, norm(b, wide)), _activation(b, norm(b, narrow))]
    if results[0].shape == results[1].shape:
        b.call("stack", aten.stack.default, results, b.pick(0, -1))


def token_embedding(b: Builder) -> None:
    """stream += table[ids] + positions[arange(tokens)]."""
    shape = int(b.batch), int(b.tokens)
    known = [
        v for v in b.values if v.dtype == torch.int64 and v.shape == shape and v.high < 31 and v.low >= 0
    ]
    ids = known[0] if known else b.add_input(TensorSpec(b.input_name(), shape, torch.int64, b.seed(), 0, 31))
    words = b.call(
        "embedding", aten.embedding.default, b.weight(31, b.width, low=-1, high=1), ids, exact=True
    )
    positions = b.call("arange", aten.arange.default, b.tokens, exact=True)
    table = b.weight(64, b.width, low=-1, high=1)
    places = b.call("embedding", aten.embedding.default, table, positions, exact=True)
    _residual(b, b.call("add", aten.add.Tensor, words, places))


def dequantized_linear(b: Builder) -> None:
    """linear(x, dequantize(stored weight)) over a stream of as many columns as the format's block asks
    for."""
    name = b.pick(*STORED_FORMATS)
    layout = get_format(name)
    x = b.call("to_copy", aten._to_copy.default, linear(b, b.stream, layout.block), dtype=torch.float32)
    features, high = b.size(), 0.0005 if layout.block > 32 else 0.02
    offsets = ",".join(str(offset) for offset in layout.scales)
    shape = features, layout.row_bytes(layout.block)
    place = f"blocks:{layout.block_bytes}:{offsets}"
    weight = b.add_weight(TensorSpec(b.weight_name(), shape, torch.uint8, b.seed(), high / 4, high, place))
    values = b.call("dequantize", own.dequantize.default, weight, name, layout.block, exact=True)
    b.call("linear", aten.linear.default, x, values)


def wide_precision(b: Builder) -> None:
    """A stretch of float32 in a 16-bit program: cast up, compute, cast back."""
    if b.dtype == torch.float32:
        raise Rejected("nothing wider to go to")
    wide = b.call("to_dtype", aten.to.dtype, b.stream, torch.float32, exact=b.stream.exact)
    b.stream = b.call("to_dtype", aten.to.dtype, _activation(b, wide), b.dtype)


#: name -> the function that adds the structure
STRUCTURES: Mapping[str, Callable[[Builder], None]] = MappingProxyType(
    {
        "pointwise_chain": pointwise_chain,
        "gated_mlp": gated_mlp,
        "attention": attention,
        "siblings": siblings,
        "cat_producers": cat_producers,
        "linear_sum": linear_sum,
        "statistics": statistics,
        "split_gated_mlp": split_gated_mlp,
        "plain_mlp": plain_mlp,
        "independent_work": independent_work,
        "token_embedding": token_embedding,
        "dequantized_linear": dequantized_linear,
        "wide_precision": wide_precision,
    }
)
