"""Programs at the edges of the operations' rules, by name: a function of tensors and its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
own = torch.ops.torchweld
Case = tuple[Callable[..., object], tuple[Tensor, ...]]
INF, NAN = math.inf, math.nan


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _heads(
    batch: int, heads: int, tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    return _random(batch, heads, tokens, width, seed=seed, dtype=dtype)


X = _random(3, 5, seed=1)
CUBE = _random(2, 3, 4, seed=2)
VECTOR = _random(5, seed=3)
WHOLE = torch.tensor([-7, -3, -1, 0, 1, 3, 7])
SMALL = torch.tensor([2, -2, 3, -3, 4, 1, -1])
SPECIAL = torch.tensor([[NAN, INF, -INF, 0.0, -0.0], [1.0, NAN, 3.0, NAN, 5.0], [2.0, 7.0, 7.0, -1.0, 7.0]])
EMPTY = torch.empty(0, 5)
BYTES = torch.arange(3 * 34, dtype=torch.uint8).reshape(3, 34)
BYTES[:, 1] = 0x20
IDS = torch.tensor([[0, 2], [1, -1]])

SIZES: Mapping[str, Case] = {
    "pointwise on nothing": (lambda x: torch.relu(x + 1), (EMPTY,)),
    "sum over an empty dimension": (lambda x: (x.sum(0), x.sum(1), x.prod(0), x.sum()), (EMPTY,)),
    "mean over an empty dimension": (lambda x: x.mean(0), (EMPTY,)),
    "any and all of nothing": (lambda x: (aten.any.dim(x > 0, 0), aten.all.dim(x > 0, 0)), (EMPTY,)),
    "softmax of nothing": (lambda x: (x.softmax(0), x.softmax(1)), (EMPTY,)),
    "layer norm of no rows": (lambda x: F.layer_norm(x, (5,)), (EMPTY,)),
    "matmul with nothing to sum": (lambda a, b: a @ b + 1, (torch.empty(3, 0), torch.empty(0, 2))),
    "matmul of no rows": (lambda a, b: torch.relu(a @ b), (EMPTY, _random(5, 2))),
    "concatenation with nothing": (lambda x, y: torch.cat((y, x, y)) * 2, (X, EMPTY)),
    "concatenation with an empty vector": (lambda x: torch.cat((torch.empty(0), x), 1), (X,)),
    "reshape of nothing": (lambda x: x.reshape(5, 0, 2) + 1, (EMPTY,)),
    "pad of nothing": (lambda x: F.pad(x, (1, 2, 3, 0), value=2.5), (EMPTY,)),
    "embedding of no ids": (lambda w, i: F.embedding(i, w) * 2, (X, torch.empty(2, 0, dtype=torch.int64))),
    "attention of no queries": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k),
        (_heads(1, 2, 0, 4, 1), _heads(1, 2, 3, 4, 2)),
    ),
    "attention over no keys": (
        lambda q, k: own.attention(q, k, k, None, "none", 0, 0.5, 0.0),
        (_heads(1, 2, 3, 4, 1), _heads(1, 2, 0, 4, 2)),
    ),
    "single numbers": (
        lambda x: (x.sum(), x.softmax(0), x.mean(0), x * x, x.reshape(1, 1)),
        (torch.tensor(2.5),),
    ),
    "places in a single number": (lambda x: (x.argmax(), x.max(0)[1], x.amax()), (torch.tensor(2.5),)),
    "linear of a vector": (lambda x, w: F.linear(x, w).exp(), (VECTOR, X)),
    "dot product": (lambda a, b: torch.dot(a, b) + 1, (VECTOR, VECTOR)),
    "matrix times vector": (lambda a, b: (a @ b, b @ a.t()), (X, VECTOR)),
}

INTEGERS: Mapping[str, Case] = {
    "sum of truths": (lambda x: ((x > 0).sum(), (x > 0).sum(1), (x > 0).sum((0, 1), True)), (X,)),
    "mean of integers as floats": (lambda x: x.to(torch.float32).mean(), (WHOLE,)),
    "sum of bytes is wide": (lambda x: x.sum(), (BYTES,)),
    "bytes wrap": (lambda x: (x + 200, x * 3, -x, x - 7), (BYTES,)),
    "small integers wrap": (lambda x: (x * 100).to(torch.int8) + 100, (WHOLE,)),
    "floor division": (lambda a, b: (a // b, a % b, a // 2, a % 3), (WHOLE, SMALL)),
    "truncating division": (
        lambda a, b: (aten.div.Tensor_mode(a, b, rounding_mode="trunc"), torch.fmod(a, b)),
        (WHOLE, SMALL),
    ),
    "floor division of floats": (lambda a, b: (a // b, a % b, torch.fmod(a, b)), (X * 4, X.flip(1) + 0.3)),
    "integer power": (lambda a: (a**2, a**3, a**4, aten.pow.Scalar(2, a.abs())), (WHOLE,)),
    "true division of integers": (lambda a, b: (a / b, a / 2), (WHOLE, SMALL)),
    "bitwise": (lambda a, b: (a & b, a | b, a ^ b, ~a), (WHOLE, SMALL)),
    "logic on numbers": (
        lambda a, b: (torch.logical_and(a, b), torch.logical_xor(a > 0, b)),
        (WHOLE, X[0, 0]),
    ),
    "float to integer truncates": (lambda x: (x * 3).to(torch.int32), (X,)),
    "integer to truth": (lambda x: (x.to(torch.bool), ~(x.to(torch.bool))), (WHOLE,)),
    "argmax takes the first of equals": (
        lambda x: (x.argmax(1), x.argmin(1), x.argmax()),
        (torch.ones(3, 4),),
    ),
    "whole extremes": (lambda x: (x.amax(), x.amin(0), x.max(), x.min()), (WHOLE,)),
    "truth extremes": (lambda x: ((x > 0).amax(1), (x > 0).amin(1), (x > 0).max()), (X,)),
}

PROMOTION: Mapping[str, Case] = {
    "integers and a number": (lambda x: (x * 0.5, x + 2.0, x - 1), (WHOLE,)),
    "narrow and wide floats": (lambda a, b: (a + b, a * 2), (X.bfloat16(), X)),
    "both sixteen-bit floats": (lambda a, b: a * b, (X.bfloat16(), X.half())),
    "a single wide number does not promote": (lambda a, b: (a + b, b * a), (X.bfloat16(), torch.tensor(0.3))),
    "a single wide number with integers": (
        lambda a, b: a + b,
        (WHOLE, torch.tensor(0.3, dtype=torch.float64)),
    ),
    "truth times number": (lambda a: (a > 0) * a + (a > 0), (X,)),
    "truth and integer": (lambda a, b: (b + (b > 1)) * (b > 0), (X, WHOLE)),
    "narrowing cast rounds": (lambda x: x.to(torch.bfloat16).float() - x, (X,)),
    "narrowing cast before a sum": (lambda x: x.half().float().sum(1), (X * 100,)),
    "casts in a row": (lambda x: x.to(torch.bfloat16).to(torch.float16).to(torch.float32), (X,)),
    "mixed concatenation": (lambda a, b: torch.cat((a, b), 1), (X, X.bfloat16())),
    "mixed choice": (lambda a, b: torch.where(a > 0, a, b), (X, WHOLE[:5])),
    "clamp between tensors": (lambda x, a: torch.clamp(x, min=a, max=a + 1), (X, VECTOR)),
    "clamp of integers by a float": (lambda x: torch.clamp(x, -1.5, 2.5), (WHOLE,)),
    "double precision": (lambda x: (x.exp(), x.sum(1), x @ x.t(), x.softmax(1)), (X.double(),)),
    "softmax in another dtype": (lambda x: F.softmax(x, 1, dtype=torch.float32), (X.bfloat16(),)),
    "sum in another dtype": (lambda x: x.sum(1, dtype=torch.float64), (X,)),
    "sum of halves": (lambda x: (x.sum(1), x.mean(0), x.var(1)), (X.half(),)),
}

SPECIALS: Mapping[str, Case] = {
    "extremes with NaN": (lambda x: (x.amax(1), x.amin(1), x.max(), torch.maximum(x, x.flip(1))), (SPECIAL,)),
    "places with NaN": (lambda x: (x.argmax(1), x.argmin(1), x.max(1)[1], x.min(1)[1]), (SPECIAL,)),
    "clamp keeps NaN": (lambda x: (x.clamp(-1, 1), torch.relu(x), F.hardtanh(x)), (SPECIAL,)),
    "comparisons with NaN": (lambda x: (x > 0, x == x, x != x, x <= INF), (SPECIAL,)),
    "activations at infinity": (
        lambda x: (F.silu(x), F.gelu(x), x.tanh(), x.sigmoid(), x.exp()),
        (SPECIAL[2:],),
    ),
    "softmax with infinity": (
        lambda x: (x.softmax(1), x.log_softmax(1), x.logsumexp(1)),
        (SPECIAL[2:] * -INF,),
    ),
    "sign and rounding": (lambda x: (x.sign(), x.round(), x.floor(), x.trunc(), x.ceil()), (SPECIAL,)),
    "half rounds to even": (lambda x: x.round(), (torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]),)),
    "nan_to_num": (lambda x: (torch.nan_to_num(x), torch.nan_to_num(x, 1.0, 2.0, 3.0)), (SPECIAL,)),
    "nan_to_num of halves": (lambda x: torch.nan_to_num(x), (SPECIAL.half(),)),
    "softplus and friends": (lambda x: (F.softplus(x), F.logsigmoid(x), F.elu(x), F.mish(x)), (X * 30,)),
    "masked fill with infinity": (lambda x: x.masked_fill(x > 0, -INF).softmax(-1), (X,)),
    "truth of special values": (
        lambda x: (x.to(torch.bool), torch.logical_not(x), x.isnan(), x.isinf()),
        (SPECIAL,),
    ),
    "norms of special values": (lambda x: (F.layer_norm(x, (5,)), F.rms_norm(x, (5,))), (SPECIAL,)),
}

MOVEMENT: Mapping[str, Case] = {
    "slices": (lambda x: (x[:, 1:99], x[-2:], x[..., ::2], x[:, -4:-1:2], x[5:], x[:, 2:1]), (X,)),
    "slices of slices": (lambda x: x[:, 1:][:, ::2][-1:] + 1, (X,)),
    "selects": (lambda x: (x[-1] + 1, x[:, -2] * 2, x[0, -1]), (X,)),
    "split in uneven pieces": (lambda x: [p * 2 for p in x.split(2, 1)], (X,)),
    "chunk and unbind": (lambda x: [p + 1 for p in x.chunk(2, 1)] + [p - 1 for p in x.unbind(0)], (X,)),
    "stack of two dtypes of work": (lambda x: torch.stack((x.exp(), x.sum(0).expand(3, 5), x), 1), (X,)),
    "stack in front and behind": (lambda x: (torch.stack((x, x + 1), 0), torch.stack((x, x + 1), -1)), (X,)),
    "concatenation of matmuls": (lambda x, y: torch.cat((x @ y.t(), y @ x.t(), x), 1), (X, X + 1)),
    "concatenation of concatenations": (lambda x: torch.cat((torch.cat((x, x + 1)), x * 2)), (X,)),
    "flip and roll": (lambda x: (x.flip(0, 1) + 1, x.flip(-1)), (X,)),
    "repeat": (lambda x: (x.repeat(2, 1, 3) + 1, x.repeat_interleave(2, 1) * 2), (X,)),
    "expand": (lambda x: (x.unsqueeze(1).expand(3, 2, 5) + 1, x[:, :1].expand(-1, 4) * 2), (X,)),
    "squeeze": (lambda x: (x[:1].squeeze() + 1, x[:1].squeeze(1) * 2, x.unsqueeze(-1).squeeze(-1)), (X,)),
    "reshape over a transpose": (lambda x: (x.t().reshape(3, 5) + 1, x.transpose(0, 1).flatten() * 2), (X,)),
    "reshape splits and joins": (
        lambda x: (x.reshape(4, 6) + 1, x.permute(2, 0, 1).reshape(8, 3).exp()),
        (CUBE,),
    ),
    "triangles": (lambda x: (x.tril(), x.triu(1), x.tril(-1), x.triu(-2)), (X,)),
    "pad and cut": (lambda x: (F.pad(x, (2, -1)), F.pad(x, (-1, 1, 0, 2), value=3.0) + 1), (X,)),
    "index by one tensor": (lambda x, i: (x[i] + 1, x[:, i] * 2), (X, IDS)),
    "index by two tensors": (lambda x, i: (x[i, i] + 1, x[:, i, i.flip(0)] * 2), (CUBE, IDS % 2)),
    "index by tensors apart": (lambda x, i: x[i, :, i + 1] * 2, (CUBE, torch.tensor([0, 1]))),
    "index that broadcasts": (lambda x, i: x[:, i[:, None], i] * 2, (CUBE, torch.tensor([0, 2]))),
    "index by an input": (lambda x, i: x.index_select(1, i[0]) + x.gather(1, i.abs()).sum(), (X, IDS % 3)),
    "gathered then summed": (lambda w, i: F.embedding(i, w).sum(1), (X, IDS % 3)),
    "two gathers in one sum": (
        lambda w, v, i: F.embedding(i, w) + F.embedding(i + 1, v),
        (X, X * 2, IDS % 2),
    ),
    "one gather in two results": (lambda w, i: (F.embedding(i, w) * 2, F.embedding(i, w) + 1), (X, IDS % 3)),
    "rows of a stored weight": (
        lambda b, i: own.dequantize(F.embedding(i, b), "Q8_0", 32) + 1,
        (BYTES, IDS % 3),
    ),
    "stored weight in a matmul": (
        lambda b, x: F.linear(x, own.dequantize(b, "Q8_0", 32)) + 1,
        (BYTES, _random(2, 32)),
    ),
    "arange and full": (
        lambda x: (x + torch.arange(5), x * torch.full((3, 1), 2.0), torch.arange(1, 9, 3)),
        (X,),
    ),
    "linspace by floats": (lambda x: x + torch.arange(0.0, 1.0, 0.2), (X,)),
}

RESULTS: Mapping[str, Case] = {
    "an input": (lambda x, y: (x, y + 1, x), (X, VECTOR)),
    "a view of an input": (lambda x: (x.t(), x[1], x.reshape(15)), (X,)),
    "a view of a result": (lambda x: (x.exp().t(), x.exp()), (X,)),
    "one value twice": (lambda x: (lambda y: (y, y))(x * 2), (X,)),
    "a constant": (lambda x: (torch.ones(2, 3), x + 1, torch.arange(3)), (X,)),
    "an unused input": (lambda x, y: x + 1, (X, VECTOR)),
    "a place and its value": (lambda x: (*x.max(1), *x.min(0, keepdim=True)), (X,)),
    "only the place": (lambda x: x.max(1)[1] + 1, (X,)),
    "only the value": (lambda x: x.max(1)[0] + 1, (X,)),
    "non-contiguous inputs": (lambda x, y: x + y, (X.t(), _random(5, 6, seed=4)[:, ::2])),
    "one input twice": (lambda x, y: (x * y, x + y), (X, X)),
    "expanded input": (lambda x: x * 2 + x.sum(), (VECTOR.expand(3, 5),)),
    "an operation without a kernel in between": (lambda x: torch.cumsum(x.exp(), 1) * 2, (X,)),
    "a view of an operation without a kernel": (
        lambda x: (torch.cumsum(x, 1).t() + 1, x.cumsum(0)[1:]),
        (X,),
    ),
    "several results without a kernel": (lambda x: (x.sort(1)[0] * 2, x.topk(2)[1]), (X,)),
}

REDUCTIONS: Mapping[str, Case] = {
    "several dimensions": (
        lambda x: (x.sum((0, 2)), x.mean((0, 1), True), x.amax((1, 2)), x.var((0, 2))),
        (CUBE,),
    ),
    "negative dimensions": (lambda x: (x.sum(-2), x.softmax(-3), x.argmax(-2, True), x.std(-1)), (CUBE,)),
    "all of them": (lambda x: (x.sum(), x.mean(), x.std(), x.amax(), x.argmax()), (CUBE,)),
    "softmax over the first": (lambda x: x.softmax(0) + x.log_softmax(1), (CUBE,)),
    "reduction of a reduction": (lambda x: x.sum(2).amax(1) - x.amax((1, 2)), (CUBE,)),
    "reduction around a reduction": (lambda x: (x - x.mean(2, True)).abs().sum(2), (CUBE,)),
    "norm over two dimensions": (lambda x, w: F.layer_norm(x, (3, 4), w, w), (CUBE, CUBE[0])),
    "norm of one feature": (lambda x: (F.layer_norm(x[:, :1], (1,)), F.rms_norm(x[:, :1], (1,))), (X,)),
    "norm without epsilon": (lambda x: F.rms_norm(x, (5,)), (X,)),
    "norm without epsilon of halves": (lambda x: F.rms_norm(x, (5,)), (X.half(),)),
    "vector norm": (lambda x: (torch.linalg.vector_norm(x), F.normalize(x, dim=0)), (X,)),
    "logsumexp of several": (lambda x: x.logsumexp((0, 2), True), (CUBE,)),
    "a sum of a broadcast": (lambda x, y: (x[:, None] * y).sum(1), (X, VECTOR)),
    "variance of one": (lambda x: (x[:1].var(0, correction=0), x[:1].var(0)), (X,)),
    "products": (lambda x: (x.prod(1), x.prod()), (X,)),
    "norm then matmul then softmax": (lambda x, w: F.linear(F.rms_norm(x, (5,)), w).softmax(-1), (X, X)),
    "matmul scaled by its own row": (lambda x, w: F.linear(x, w) * x.sum(1, True), (X, X)),
    "sum of two matmuls": (lambda x, w: F.linear(x, w) + F.linear(x + 1, w.flip(0)), (X, X)),
    "matmul into a reduction": (lambda x, w: F.linear(x, w).sum(0), (X, X)),
    "matmul of a transposed result": (lambda x, w: (x @ w.t()).t() @ x, (X, X)),
    "batched matmul that broadcasts": (lambda a, b: a @ b, (CUBE[:, None], _random(4, 4, 2))),
    "addmm with numbers": (
        lambda c, a, b: aten.addmm.default(c, a, b.t(), beta=0.5, alpha=2),
        (X[:, :3], X, X),
    ),
}


def _attention(dtype: torch.dtype = torch.float32, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return _heads(2, 4, 3, 8, 1, dtype), _heads(2, heads, 5, 8, 2, dtype), _heads(2, heads, 5, 6, 3, dtype)


BLIND = torch.ones(2, 1, 3, 5, dtype=torch.bool)
BLIND[0, :, 1] = False
ATTENTION: Mapping[str, Case] = {
    "causal": (lambda q, k, v: own.attention(q, k, v, None, "causal", 0, 0.3, 0.0), _attention()),
    "window": (lambda q, k, v: own.attention(q, k, v, None, "window", 2, 0.3, 0.0), _attention()),
    "soft cap": (lambda q, k, v: own.attention(q, k, v, None, "none", 0, 0.3, 2.0), _attention()),
    "more queries than keys": (
        lambda q, k, v: own.attention(k, q, q, None, "causal", 0, 0.3, 0.0),
        _attention(heads=4),
    ),
    "a query that sees nothing": (
        lambda q, k, v, m: own.attention(q, k, v, m, "none", 0, 0.3, 0.0),
        (*_attention(), BLIND),
    ),
    "a mask that adds": (
        lambda q, k, v, m: own.attention(q, k, v, m, "causal", 0, 0.3, 0.0),
        (*_attention(), _random(1, 4, 1, 5)),
    ),
    "a mask that hides by infinity": (
        lambda q, k, v, m: own.attention(q, k, v, torch.where(m, 0.0, -INF), "none", 0, 0.3, 0.0),
        (*_attention(), BLIND),
    ),
    "sixteen bits": (
        lambda q, k, v: own.attention(q, k, v, None, "causal", 0, 0.3, 0.0),
        _attention(torch.bfloat16),
    ),
    "scaled in torch's words": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.2),
        (*_attention(heads=4), BLIND),
    ),
    "causal in torch's words": (
        lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        (_heads(2, 4, 5, 8, 1),),
    ),
    "written out": (
        lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v,
        _attention(heads=4),
    ),
    "then a projection": (
        lambda q, k, v, w: F.linear(
            own.attention(q, k, v, None, "causal", 0, 0.3, 0.0).transpose(1, 2).reshape(2, 3, 24), w
        ),
        (*_attention(), _random(5, 24)),
    ),
    "rope on the query": (
        lambda q, k, v, c: own.attention(own.rope(q, c, c, False), k, v, None, "causal", 0, 0.3, 0.0),
        (*_attention(), _random(3, 4)),
    ),
    "rope pairs": (lambda q, c: own.rope(q, c, c + 1, True) * 2, (_heads(2, 4, 3, 8, 1), _random(3, 8))),
}

CASES: Mapping[str, Case] = MappingProxyType(
    {
        f"{kind}: {name}": case
        for kind, table in (
            ("sizes", SIZES), ("integers", INTEGERS), ("promotion", PROMOTION), ("special values", SPECIALS),
            ("movement", MOVEMENT), ("results", RESULTS), ("reductions", REDUCTIONS), ("attention", ATTENTION),
        )
        for name, case in table.items()
    }
)  # fmt: skip
