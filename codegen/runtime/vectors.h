// Vectors of 64 bytes in the language of gcc and clang, and the few instructions that the language has no word for.
// The results do not depend on which branch of the #if is taken (fma contraction excepted).

typedef float tw_v16 __attribute__((vector_size(64)));
typedef double tw_v8d __attribute__((vector_size(64)));
typedef int32_t tw_i16 __attribute__((vector_size(64)));
typedef tw_v16 tw_v16_any __attribute__((aligned(1), may_alias));
typedef tw_v8d tw_v8d_any __attribute__((aligned(1), may_alias));

static inline tw_v16 tw_load(const float* p) { return *(const tw_v16_any*)p; }
static inline tw_v8d tw_load(const double* p) { return *(const tw_v8d_any*)p; }
static inline void tw_put(float* p, tw_v16 v) { *(tw_v16_any*)p = v; }
static inline void tw_put(double* p, tw_v8d v) { *(tw_v8d_any*)p = v; }
static inline tw_v16 tw_splat(float x) { return x - tw_v16{}; }
static inline tw_i16 tw_splat_int(int32_t x) { return x - tw_i16{}; }
static inline tw_v16 tw_to_float(tw_i16 x) { return __builtin_convertvector(x, tw_v16); }
static constexpr tw_i16 tw_iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

#if defined(__AVX512F__) && !defined(__clang__)
typedef char tw_c16 __attribute__((vector_size(16)));
typedef tw_c16 tw_c16_any __attribute__((aligned(1), may_alias));
typedef short tw_s16 __attribute__((vector_size(32)));
typedef tw_s16 tw_s16_any __attribute__((aligned(1), may_alias));
static constexpr uint16_t tw_every = 0xffff;
static inline tw_v16 tw_fma(tw_v16 a, tw_v16 b, tw_v16 c) {
    return __builtin_ia32_vfmaddps512_mask(a, b, c, tw_every, 4);
}
static inline tw_v8d tw_fma(tw_v8d a, tw_v8d b, tw_v8d c) {
    return __builtin_ia32_vfmaddpd512_mask(a, b, c, (uint8_t)0xff, 4);
}
static inline tw_i16 tw_widen_u8(const uint8_t* p) {
    return (tw_i16)__builtin_ia32_pmovzxbd512_mask(*(const tw_c16_any*)p, tw_i16{}, tw_every);
}
static inline tw_i16 tw_widen_i8(const uint8_t* p) {
    return (tw_i16)__builtin_ia32_pmovsxbd512_mask(*(const tw_c16_any*)p, tw_i16{}, tw_every);
}
static inline tw_i16 tw_widen_u16(const uint8_t* p) {
    return (tw_i16)__builtin_ia32_pmovzxwd512_mask(*(const tw_s16_any*)p, tw_i16{}, tw_every);
}
static inline tw_v16 tw_widen_f16(const uint8_t* p) {
    return __builtin_ia32_vcvtph2ps512_mask(*(const tw_s16_any*)p, tw_v16{}, tw_every, 4);
}
static inline tw_v16 tw_splat_half(const uint8_t* p) {
    short h; __builtin_memcpy(&h, p, 2);
    return __builtin_ia32_vcvtph2ps512_mask(tw_s16{h, h, h, h, h, h, h, h, h, h, h, h, h, h, h, h}, tw_v16{}, tw_every, 4);
}
#else
static inline tw_v16 tw_splat_half(const uint8_t* p) { return tw_splat(tw_half_at(p)); }
template <class V> static inline V tw_fma_lanes(V a, V b, V c) {
    V y;
    for (int l = 0; l < (int)(sizeof(V) / sizeof(a[0])); ++l) y[l] = tw_fma(a[l], b[l], c[l]);
    return y;
}
static inline tw_v16 tw_fma(tw_v16 a, tw_v16 b, tw_v16 c) { return tw_fma_lanes(a, b, c); }
static inline tw_v8d tw_fma(tw_v8d a, tw_v8d b, tw_v8d c) { return tw_fma_lanes(a, b, c); }
static inline tw_i16 tw_widen_u8(const uint8_t* p) {
    tw_i16 y; for (int l = 0; l < 16; ++l) y[l] = p[l]; return y;
}
static inline tw_i16 tw_widen_i8(const uint8_t* p) {
    tw_i16 y; for (int l = 0; l < 16; ++l) y[l] = (int8_t)p[l]; return y;
}
static inline tw_i16 tw_widen_u16(const uint8_t* p) {
    tw_i16 y; for (int l = 0; l < 16; ++l) y[l] = p[2 * l] | p[2 * l + 1] << 8; return y;
}
static inline tw_v16 tw_widen_f16(const uint8_t* p) {
    tw_v16 y; for (int l = 0; l < 16; ++l) y[l] = tw_half_at(p + 2 * l); return y;
}
#endif

// table[index] for indices below 16 (below 32: of two tables in a row); higher bits of the index are ignored.
#if defined(__clang__)
static inline tw_v16 tw_lookup(tw_v16 t, tw_i16 i) {
    tw_v16 y; for (int l = 0; l < 16; ++l) y[l] = t[i[l] & 15]; return y;
}
static inline tw_v16 tw_lookup(tw_v16 t, tw_v16 u, tw_i16 i) {
    tw_v16 y; for (int l = 0; l < 16; ++l) y[l] = i[l] & 16 ? u[i[l] & 15] : t[i[l] & 15]; return y;
}
#else
static inline tw_v16 tw_lookup(tw_v16 t, tw_i16 i) { return __builtin_shuffle(t, i); }
static inline tw_v16 tw_lookup(tw_v16 t, tw_v16 u, tw_i16 i) { return __builtin_shuffle(t, u, i); }
#endif

// The sums of the lanes of C accumulators, each by the same tree: lane l with l + 8, l + 4, then (0 + 1) + (2 + 3).
template <int C> static inline void tw_sum_lanes(const tw_v16* x, float* out) {
#define TW_LOW 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define TW_HIGH 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define TW_EVEN 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27
#define TW_ODD 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31
#define TW_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
    for (int c = 0; c < C; c += 4) {
        const tw_v16 first = TW_SHUFFLE(x[c], x[c + 1], TW_LOW) + TW_SHUFFLE(x[c], x[c + 1], TW_HIGH);
        const tw_v16 second = TW_SHUFFLE(x[c + 2], x[c + 3], TW_LOW) + TW_SHUFFLE(x[c + 2], x[c + 3], TW_HIGH);
        tw_v16 four = TW_SHUFFLE(first, second, TW_EVEN) + TW_SHUFFLE(first, second, TW_ODD);
        four += TW_SHUFFLE(four, four, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        four += TW_SHUFFLE(four, four, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        for (int i = 0; i < 4; ++i) out[c + i] = four[4 * i];
    }
}
template <int C> static inline void tw_sum_lanes(const tw_v8d* x, double* out) {
    for (int c = 0; c < C; ++c) {
        const tw_v8d v = x[c];
        const double s0 = v[0] + v[4], s1 = v[1] + v[5], s2 = v[2] + v[6], s3 = v[3] + v[7];
        out[c] = (s0 + s1) + (s2 + s3);
    }
}
