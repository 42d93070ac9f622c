// Scalars: 16-bit floats, Python-like division, NaN-propagating extrema and branch-free special functions.
// Every function is straight-line code, so that a loop over it vectorizes. No header is included: compiling this
// takes a few milliseconds.

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;

extern "C" {
float logf(float); float log2f(float); float log1pf(float); float expm1f(float); float exp2f(float);
float sinf(float); float cosf(float); float powf(float, float); float atan2f(float, float); float fmodf(float, float);
double log(double); double log2(double); double log1p(double); double expm1(double); double exp(double);
double exp2(double); double tanh(double); double erf(double); double sin(double); double cos(double);
double pow(double, double); double atan2(double, double); double fmod(double, double);
}

#if defined(__FMA__) || defined(__aarch64__)
static inline float tw_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
static inline double tw_fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
static inline float tw_fma(float a, float b, float c) { return a * b + c; }
static inline double tw_fma(double a, double b, double c) { return a * b + c; }
#endif

static inline float tw_float_of_bits(uint32_t bits) { float x; __builtin_memcpy(&x, &bits, 4); return x; }
static inline uint32_t tw_bits_of_float(float x) { uint32_t bits; __builtin_memcpy(&bits, &x, 4); return bits; }

template <class To, class From> static inline To tw_bitcast(From x) {
    static_assert(sizeof(To) == sizeof(From), "a bitcast keeps the width");
    To y; __builtin_memcpy(&y, &x, sizeof(To)); return y;
}

// bfloat16: the upper half of a float; rounds to nearest even, every NaN becomes the quiet one.
static inline float tw_from_bf16(uint16_t h) { return tw_float_of_bits((uint32_t)h << 16); }
static inline uint16_t tw_to_bf16(float x) {
    const uint32_t bits = tw_bits_of_float(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0u : rounded);
}

// float16 by integer arithmetic, which needs no instruction set extension and vectorizes.
static inline float tw_from_f16(uint16_t h) {
    const uint32_t magnitude = (uint32_t)(h & 0x7fffu) << 13;
    const uint32_t finite = tw_bits_of_float(tw_float_of_bits(magnitude) * 0x1p112f);
    const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
    return tw_float_of_bits(bits | ((uint32_t)(h & 0x8000u) << 16));
}
static inline uint16_t tw_to_f16(float x) {
    const uint32_t bits = tw_bits_of_float(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // 0xc8000000: (15 - 127) << 23
    const uint32_t subnormal = tw_bits_of_float(tw_float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    return (uint16_t)(sign | (magnitude >= 0x47800000u ? special : finite));
}
static inline float tw_round_bf16(float x) { return tw_from_bf16(tw_to_bf16(x)); }
static inline float tw_round_f16(float x) { return tw_from_f16(tw_to_f16(x)); }

// One float16, as a scale of a block. The vector instruction: the scalar one (cvtsh2ss) waits for the last result in its
// register, which made a whole product wait for it.
static inline float tw_half_at(const uint8_t* p) {
#if defined(__F16C__)
    typedef int16_t eight __attribute__((vector_size(16)));
    int16_t h; __builtin_memcpy(&h, p, 2);
    return __builtin_ia32_vcvtph2ps(eight{h, 0, 0, 0, 0, 0, 0, 0})[0];
#elif defined(__aarch64__)
    _Float16 h; __builtin_memcpy(&h, p, 2); return (float)h;
#else
    uint16_t h; __builtin_memcpy(&h, p, 2); return tw_from_f16(h);
#endif
}

template <class T> static inline T tw_least(T a, T b) { return b < a ? b : a; }
template <class T> static inline T tw_most(T a, T b) { return a < b ? b : a; }
// torch's maximum and minimum: a NaN on either side wins.
template <class T> static inline T tw_max(T a, T b) { return (a > b) | (a != a) ? a : b; }
template <class T> static inline T tw_min(T a, T b) { return (a < b) | (a != a) ? a : b; }

template <class T> static inline T tw_relu(T x) { return x < 0 ? (T)0 : x; }  // NaN and -0 stay

template <class T> static inline T tw_floordiv_int(T a, T b) {
    if (b == 0) return 0;
    const T q = (T)(a / b);
    return (T)(q - (a % b != 0 && (a < 0) != (b < 0)));
}
template <class T> static inline T tw_mod_int(T a, T b) {
    if (b == 0) return 0;
    const T r = (T)(a % b);
    return (T)(r != 0 && (r < 0) != (b < 0) ? r + b : r);
}
static inline float tw_fmod(float a, float b) { return fmodf(a, b); }
static inline double tw_fmod(double a, double b) { return fmod(a, b); }
static inline float tw_floor(float x) { return __builtin_floorf(x); }
static inline double tw_floor(double x) { return __builtin_floor(x); }
// torch's remainder: the sign of the divisor.
template <class T> static inline T tw_mod_real(T a, T b) {
    const T r = tw_fmod(a, b);
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
// torch's floor division: through the remainder, so that a quotient just below an integer is not rounded up to it.
template <class T> static inline T tw_floordiv_real(T a, T b) {
    const T r = tw_fmod(a, b);
    T q = (a - r) / b;
    q = r != 0 && (b < 0) != (r < 0) ? q - 1 : q;
    T whole = tw_floor(q);
    whole = q - whole > (T)0.5 ? whole + 1 : whole;
    whole = q == 0 ? (T)0 * (a / b) : whole;
    return b == 0 ? a / b : whole;
}
template <class T> static inline T tw_pow_int(T base, T exponent) {
    if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent % 2 ? -1 : 1) : 0;
    T result = 1;
    for (; exponent; exponent /= 2, base = (T)(base * base)) if (exponent % 2) result = (T)(result * base);
    return result;
}
template <class T> static inline T tw_sign(T x) { return (T)((x > 0) - (x < 0)); }
// As torch: the sign of NaN is 0.
static inline float tw_sign_real(float x) { return (float)((x > 0) - (x < 0)); }
static inline double tw_sign_real(double x) { return (double)((x > 0) - (x < 0)); }
// A float outside an integer's range has no value in C++; it becomes the least integer, as the hardware does it.
static inline int64_t tw_to_int(double x) {
    return x >= -0x1p63 && x < 0x1p63 ? (int64_t)x : (int64_t)0x8000000000000000ul;
}
static inline int32_t tw_to_int32(float x) {
    return x >= -0x1p31f && x < 0x1p31f ? (int32_t)x : (int32_t)0x80000000u;
}

// exp(x) = 2^n * e^r, n = round(x / ln 2), |r| <= ln 2 / 2; the power of two in two halves, so that results from the
// least subnormal to the greatest float are rounded once. Within 1 ulp.
static inline float tw_exp(float x) {
    const float shifted = tw_fma(x, 1.44269504088896341f, 12582912.0f);  // 1.5 * 2^23: the integer in the low bits
    const float n = shifted - 12582912.0f;
    const int32_t power = (int32_t)tw_bits_of_float(shifted) - 0x4b400000;
    float r = tw_fma(n, -0.693145751953125f, x);
    r = tw_fma(n, -1.42860682030941723212e-6f, r);
    float p = 1.9875691500e-4f;
    p = tw_fma(p, r, 1.3981999507e-3f);
    p = tw_fma(p, r, 8.3334519073e-3f);
    p = tw_fma(p, r, 4.1665795894e-2f);
    p = tw_fma(p, r, 1.6666665459e-1f);
    p = tw_fma(p, r, 5.0000001201e-1f);
    p = tw_fma(p, r * r, r) + 1.0f;
    const int32_t half = power >> 1;
    p *= tw_float_of_bits((uint32_t)(half + 127) << 23);
    p *= tw_float_of_bits((uint32_t)(power - half + 127) << 23);
    p = x > 89.0f ? __builtin_inff() : p;  // whatever p is out there; behind it, a NaN is still one
    return x < -104.0f ? 0.0f : p;
}
static inline double tw_exp(double x) { return exp(x); }

template <class T> static inline T tw_sigmoid(T x) { return (T)1 / ((T)1 + tw_exp(-x)); }

// tanh: an odd polynomial below 0.625 (Cephes), 1 - 2 / (exp(2|x|) + 1) above.
static inline float tw_tanh(float x) {
    const float a = __builtin_fabsf(x), s = x * x;
    float p = -5.70498872745e-3f;
    p = tw_fma(p, s, 2.06390887954e-2f);
    p = tw_fma(p, s, -5.37397155531e-2f);
    p = tw_fma(p, s, 1.33314422036e-1f);
    p = tw_fma(p, s, -3.33332819422e-1f);
    const float small = tw_fma(p * s, x, x);
    const float large = __builtin_copysignf(1.0f - 2.0f / (tw_exp(a + a) + 1.0f), x);
    return a < 0.625f ? small : x != x ? x : large;
}
static inline double tw_tanh(double x) { return tanh(x); }

// erf: a minimax polynomial (after N. Juffa) below 0.927734375; above it one interpolated at the Chebyshev points up to
// 3.92, from where on it is 1. Within 3 ulp, half the instructions of 1 - exp(polynomial): it is most of a GELU.
static inline float tw_erf(float x) {
    const float a = __builtin_fabsf(x), s = x * x, t = a > 3.92f ? 3.92f : a;
    const float z = tw_fma(t, 6.683898568e-01f, -1.620088220f);
    float r = tw_fma(-8.226202772e-05f, z, -1.069594757e-03f);
    r = tw_fma(r, z, 2.682061866e-03f);
    r = tw_fma(r, z, 2.086066641e-03f);
    r = tw_fma(r, z, -1.216166094e-02f);
    r = tw_fma(r, z, 1.255441830e-02f);
    r = tw_fma(r, z, 5.700884387e-03f);
    r = tw_fma(r, z, -3.446457535e-02f);
    r = tw_fma(r, z, 5.584537610e-02f);
    r = tw_fma(r, z, -5.605772510e-02f);
    r = tw_fma(r, z, 3.803204373e-02f);
    r = tw_fma(r, z, -1.719796099e-02f);
    r = tw_fma(r, z, 4.741172772e-03f);
    r = tw_fma(r, z, 9.993916750e-01f);
    const float large = __builtin_copysignf(a > 3.92f ? 1.0f : r, x);
    float p = -5.96761703e-4f;
    p = tw_fma(p, s, 4.99119423e-3f);
    p = tw_fma(p, s, -2.67681349e-2f);
    p = tw_fma(p, s, 1.12819925e-1f);
    p = tw_fma(p, s, -3.76125336e-1f);
    p = tw_fma(p, s, 1.28379166e-1f);
    const float small = tw_fma(p, x, x);
    return a < 0.927734375f ? small : large;  // a NaN stays one on either way
}
static inline double tw_erf(double x) { return erf(x); }

// erf within 3e-5, exactly 1 from 3.03 on, in a third of the instructions: for values that are rounded to 8 bits next.
static inline float tw_erf_short(float x) {
    const float below = x > 3.029983997f ? 3.029983997f : x, t = below < -3.029983997f ? -3.029983997f : below, s = t * t;
    float p = 3.819787864e-08f;
    p = tw_fma(p, s, -1.853445042e-06f);
    p = tw_fma(p, s, 3.971681508e-05f);
    p = tw_fma(p, s, -5.006218562e-04f);
    p = tw_fma(p, s, 4.189812578e-03f);
    p = tw_fma(p, s, -2.499060147e-02f);
    p = tw_fma(p, s, 1.109345183e-01f);
    p = tw_fma(p, s, -3.752322197e-01f);
    p = tw_fma(p, s, 1.128254890e+00f);
    return p * t;  // a NaN stays one
}

static inline float tw_sqrt(float x) { return __builtin_sqrtf(x); }
static inline double tw_sqrt(double x) { return __builtin_sqrt(x); }
static inline float tw_abs(float x) { return __builtin_fabsf(x); }
static inline double tw_abs(double x) { return __builtin_fabs(x); }
static inline float tw_ceil(float x) { return __builtin_ceilf(x); }
static inline double tw_ceil(double x) { return __builtin_ceil(x); }
static inline float tw_trunc(float x) { return __builtin_truncf(x); }
static inline double tw_trunc(double x) { return __builtin_trunc(x); }
static inline float tw_rint(float x) { return __builtin_rintf(x); }
static inline double tw_rint(double x) { return __builtin_rint(x); }
static inline float tw_log(float x) { return logf(x); }
static inline double tw_log(double x) { return log(x); }
static inline float tw_log2(float x) { return log2f(x); }
static inline double tw_log2(double x) { return log2(x); }
static inline float tw_log1p(float x) { return log1pf(x); }
static inline double tw_log1p(double x) { return log1p(x); }
static inline float tw_expm1(float x) { return expm1f(x); }
static inline double tw_expm1(double x) { return expm1(x); }
static inline float tw_exp2(float x) { return exp2f(x); }
static inline double tw_exp2(double x) { return exp2(x); }
static inline float tw_sin(float x) { return sinf(x); }
static inline double tw_sin(double x) { return sin(x); }
static inline float tw_cos(float x) { return cosf(x); }
static inline double tw_cos(double x) { return cos(x); }
static inline float tw_pow(float x, float y) { return powf(x, y); }
static inline double tw_pow(double x, double y) { return pow(x, y); }
static inline float tw_atan2(float y, float x) { return atan2f(y, x); }
static inline double tw_atan2(double y, double x) { return atan2(y, x); }

// A data-dependent index: illegal ones raise the kernel's error flag and read element 0.
static inline int64_t tw_checked(int64_t index, int64_t extent, int32_t* error) {
    const bool legal = (uint64_t)index < (uint64_t)extent;
    if (!legal) __atomic_store_n(error, 1, __ATOMIC_RELAXED);
    return legal ? index : 0;
}

static inline int64_t tw_blocks(int64_t count, int64_t block) { return (count + block - 1) / block; }

// The contiguous share of `count` units that belongs to one of `threads` threads.
struct tw_range { int64_t begin, end; };
static inline tw_range tw_share(int64_t count, int64_t thread, int64_t threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}
