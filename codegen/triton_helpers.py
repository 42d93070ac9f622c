"""Device functions that printed kernels use: copied into the kernel's file by name, never imported by it.

They exist where Triton has no such function, or only one that its interpreter cannot run (libdevice).  All of them
take float32 or float64 tiles unless they say otherwise; errors are stated against float32.
"""

# mypy: ignore-errors
# Triton's functions have no types: their arguments are tiles, which Python's type system does not know.

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh by exp; a series near 0, where 1 - exp(-2x) would cancel. Error below 3 units in the last place."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    square = x * x
    near = x + x * square * (-0.33333333 + square * (0.13333333 - square * 0.053968254))
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0.0, -far, far))


@triton.jit
def log1p(x):
    """log(1 + x), corrected for the rounding of 1 + x (Goldberg, 1991)."""
    shifted = 1.0 + x
    lost = shifted - 1.0
    corrected = tl.log(shifted) * (x / tl.where(lost == 0.0, 1.0, lost))
    return tl.where(lost == 0.0, x, tl.where(shifted == float("inf"), shifted, corrected))


@triton.jit
def expm1(x):
    """exp(x) - 1, corrected for the cancellation near 0 (Kahan)."""
    grown = tl.exp(x)
    less = grown - 1.0
    regular = (tl.abs(x) < 1.0) & (less != 0.0)
    corrected = less * (x / tl.where(regular, tl.log(grown), 1.0))
    return tl.where(regular, corrected, tl.where(less == 0.0, x, less))


@triton.jit
def sign(x):
    """-1, 0 or 1 in the dtype of x; 0 for NaN, as torch."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def round_half_even(x):
    """Round to the nearest integer, ties to even: the hardware's rounding at 2^23, where floats have no fraction."""
    size = tl.abs(x)
    rounded = (size + 8388608.0) - 8388608.0
    return tl.where(size < 8388608.0, tl.where(x < 0.0, -rounded, rounded), x)


@triton.jit
def floor_divide(a, b):
    """Integer division towards minus infinity; the hardware's goes towards zero."""
    quotient = a // b
    return quotient - ((quotient * b != a) & ((a < 0) != (b < 0))).to(quotient.dtype)


@triton.jit
def floor_modulo(a, b):
    """The integer remainder that has the sign of b."""
    return a - floor_divide(a, b) * b


@triton.jit
def float_floor_divide(a, b):
    """floor(a / b) as torch has it: NaN for an infinite a, a / b for b = 0.

    In float64, because a quotient just below a whole number must not round up to it.
    """
    quotient = a.to(tl.float64) / tl.cast(b, tl.float64)
    finite = tl.where(tl.abs(a) == float("inf"), float("nan"), tl.floor(quotient))
    return tl.where(b == 0.0, quotient, finite).to(a.dtype)


@triton.jit
def float_modulo(a, b):
    """The remainder that has the sign of b; in float64, see float_floor_divide."""
    wide, divisor = a.to(tl.float64), tl.cast(b, tl.float64)
    return (wide - tl.floor(wide / divisor) * divisor).to(a.dtype)


@triton.jit
def power(x, y):
    """x to the y in float64, where the error of log2 does not grow with the result; whole y for negative x."""
    base = tl.abs(x).to(tl.float64)
    exponent = tl.cast(y, tl.float64)
    size = tl.where(base == 1.0, 1.0, tl.exp2(exponent * tl.log2(base)))
    half = exponent * 0.5
    is_whole = tl.floor(exponent) == exponent
    is_odd = is_whole & (tl.floor(half) != half)
    negative = tl.where(is_whole, tl.where(is_odd, -size, size), float("nan"))
    result = tl.where(x < 0.0, negative, size)
    if x.dtype.is_int():
        result = tl.floor(result + 0.5)  # whole powers of whole numbers, a few units of rounding off
    return tl.where(exponent == 0.0, 1.0, result).to(x.dtype)


@triton.jit
def atan2(y, x):
    """The angle of (x, y): arctangent of the smaller over the larger side (Cephes atanf), then by octant."""
    wide, high = tl.abs(x), tl.abs(y)
    larger = tl.where(wide > high, wide, high)
    smaller = tl.where(wide > high, high, wide)
    ratio = tl.where(smaller == larger, tl.where(larger == 0.0, 0.0, 1.0), smaller / larger)
    steep = ratio > 0.41421356
    t = tl.where(steep, (ratio - 1.0) / (ratio + 1.0), ratio)
    s = t * t
    series = (
        ((8.05374449538e-2 * s - 1.38776856032e-1) * s + 1.99777106478e-1) * s - 3.33329491539e-1
    ) * s * t + t
    angle = tl.where(steep, series + 0.78539816339, series)
    angle = tl.where(high > wide, 1.57079632679 - angle, angle)
    # 1 / x tells -0 from 0, which x < 0 does not.
    angle = tl.where(tl.where(x == 0.0, 1.0 / x, x) < 0.0, 3.14159265359 - angle, angle)
    angle = tl.where(x != x, x, tl.where(y != y, y, angle))
    return tl.where(tl.where(y == 0.0, 1.0 / y, y) < 0.0, -angle, angle)


@triton.jit
def sine_in_quadrant(x, shift: tl.constexpr):
    """sin(x + shift * pi / 2), good to 2 units in the last place for |x| < 2^30.

    The library's functions keep a table on the stack for huge arguments, which costs every kernel local memory. Here
    whole quarter turns are taken off in float64 (Cody and Waite), and the rest goes into the Taylor series.
    """
    wide = x.to(tl.float64)
    turns = tl.floor(wide * 0.6366197723675814 + 0.5)
    rest = ((wide - turns * 1.5707963267948966) - turns * 6.123233995736766e-17).to(tl.float32)
    turns += shift
    quadrant = (turns - 4.0 * tl.floor(turns * 0.25)).to(tl.float32)
    s = rest * rest
    sine = rest + rest * s * (-0.16666667 + s * (0.0083333333 + s * (-0.00019841270 + s * 2.7557319e-6)))
    cosine = 1.0 + s * (
        -0.5 + s * (0.041666667 + s * (-0.0013888889 + s * (2.4801587e-5 - s * 2.7557319e-7)))
    )
    size = tl.where(tl.where(quadrant > 1.5, quadrant - 2.0, quadrant) > 0.5, cosine, sine)
    return tl.where(quadrant > 1.5, -size, size)


@triton.jit
def sin(x):
    """The sine of float32; see sine_in_quadrant."""
    return sine_in_quadrant(x, 0)


@triton.jit
def cos(x):
    """The cosine of float32; see sine_in_quadrant."""
    return sine_in_quadrant(x, 1)


@triton.jit
def max_with_nan(x, axis: tl.constexpr, keep_dims: tl.constexpr):
    """The maximum along an axis; NaN if there is one, which tl.max drops."""
    top = tl.max(x, axis=axis, keep_dims=keep_dims)
    has_nan = tl.max((x != x).to(tl.int32), axis=axis, keep_dims=keep_dims)
    return tl.where(has_nan > 0, float("nan"), top)


@triton.jit
def min_with_nan(x, axis: tl.constexpr, keep_dims: tl.constexpr):
    """The minimum along an axis; NaN if there is one, which tl.min drops."""
    bottom = tl.min(x, axis=axis, keep_dims=keep_dims)
    has_nan = tl.max((x != x).to(tl.int32), axis=axis, keep_dims=keep_dims)
    return tl.where(has_nan > 0, float("nan"), bottom)


@triton.jit
def multiply(a, b):
    """The product, as a combination for tl.reduce."""
    return a * b


@triton.jit
def join_states(top, total, mixed, other_top, other_total, other_mixed):
    """The states of a softmax over two sets of keys as that over both: maximum, sum of weights, weighted values.

    Written with fma, so that no compiler is free to round the products in one place and not in another.
    """
    joined = tl.maximum(top, other_top)
    base = tl.where(joined == float("-inf"), 0.0, joined)
    kept, added = tl.exp(top - base), tl.exp(other_top - base)
    return joined, tl.fma(total, kept, other_total * added), tl.fma(mixed, kept, other_mixed * added)


@triton.jit
def search_keys(x, place):
    """One int64 for each float32 entry of a row, greater for what comes earlier in descending order.

    The upper half is the number, as an integer of the same order with NaN above all; the lower half puts the lower of
    two places in front. 0 and -0 are equal, so both are 0.
    """
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    order = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)


@triton.jit
def no_keys(rows: tl.constexpr, lanes: tl.constexpr, count: tl.constexpr):
    """Lists of `count` keys below every entry's and above what masked columns have; lanes beyond stay as they are."""
    lane = tl.arange(0, lanes)[None, :].to(tl.int64)
    empty = tl.where(lane < count, lane - 9200000000000000000, 0x7FFFFFFFFFFFFFFF)
    return tl.broadcast_to(empty, [rows, lanes])


@triton.jit
def keep_greatest(found, keys):
    """Lists `found` of every row with their least keys replaced while `keys` have a greater one.

    Keys of a row are all different; a round takes one of every row. Most tiles have nothing and take no round.
    """
    top = tl.max(keys, axis=1, keep_dims=True)
    least = tl.min(found, axis=1, keep_dims=True)
    while tl.max((top > least).to(tl.int32)) > 0:
        found = tl.where((found == least) & (top > least), top, found)
        keys = tl.where(keys == top, -0x7FFFFFFFFFFFFFFF, keys)
        top = tl.max(keys, axis=1, keep_dims=True)
        least = tl.min(found, axis=1, keep_dims=True)
    return found


@triton.jit
def keys_in_order(found, lanes: tl.constexpr, count: tl.constexpr):
    """The first `count` lanes of every list in descending order."""
    lane = tl.arange(0, lanes)[None, :]
    rest = tl.where(lane < count, found, -0x7FFFFFFFFFFFFFFF)
    ordered = rest
    for rank in range(count):
        top = tl.max(rest, axis=1, keep_dims=True)
        ordered = tl.where(lane == rank, top, ordered)
        rest = tl.where(rest == top, -0x7FFFFFFFFFFFFFFF, rest)
    return ordered


@triton.jit
def key_value(keys):
    """The numbers of keys."""
    order = (keys >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_place(keys):
    """The places of keys."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)
