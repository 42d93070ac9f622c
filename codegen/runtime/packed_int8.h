// Products of a few rows in int8 with packed weights: vpdpbusd, exact sums of 16 or 32 columns, scaled in float.
//
// A row is quantized in blocks of 32: scale = greatest / 127, q = a / scale to nearest, so that a number is off by at
// most half a scale. total = fma(d * scale, sum of q * code, fma(m * scale, sum of q, total)), k ascending: a row has the
// same bits for any number of rows.
//   q [rows, stride] int8    scales [rows, stride / 32]    sums [rows, stride / 16]: minus the sums of 16 q

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(__clang__)
static constexpr bool tw_has_int8 = true;
typedef int32_t tw_quad __attribute__((may_alias));

// All lanes joined by halving the distance, in every lane.
template <class J> static inline tw_i16 tw_join_lanes(tw_i16 x, J join) {
    x = join(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = join(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3));
    x = join(x, __builtin_shufflevector(x, x, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1));
    return join(x, __builtin_shufflevector(x, x, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0));
}

static inline void tw_quantize_row(const float* a, int64_t count, int8_t* q, float* scales, int32_t* sums) {
    typedef int8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));
    const auto most = [](tw_i16 x, tw_i16 y) { return x > y ? x : y; };
    const auto plus = [](tw_i16 x, tw_i16 y) { return x + y; };
    const tw_v16 round = tw_splat(12582912.0f);  // 1.5 * 2^23: the integer stands in the low bits of the sum
    for (int64_t block = 0; block < count / 32; ++block) {
        const tw_v16 x[2] = {tw_load(a + 32 * block), tw_load(a + 32 * block + 16)};
        // As integers the absolute values have the same order, and a NaN is greater than all.
        const tw_i16 top = tw_join_lanes(most((tw_i16)x[0] & 0x7fffffff, (tw_i16)x[1] & 0x7fffffff), most);
        const float greatest = ((tw_v16)top)[0];
        const float inverse = greatest > 0 ? 127.0f / greatest : 0.0f;
        scales[block] = greatest / 127.0f;
        for (int half = 0; half < 2; ++half) {
            // The greatest may come out a little above 127. An infinity or a NaN goes into the sum with the scale.
            const tw_v16 y = x[half] * inverse, low = y > -127.0f ? y : tw_splat(-127.0f);
            const tw_v16 step = low < 127.0f ? low : tw_splat(127.0f);
            const tw_i16 whole = (tw_i16)(step + round) - 0x4b400000;
            *(bytes*)(q + 32 * block + 16 * half) = __builtin_convertvector(whole, bytes);
            sums[2 * block + half] = -tw_join_lanes(whole, plus)[0];
        }
    }
}

template <class F, int M, int G>
static inline void tw_int8_tile(const int8_t* a, int64_t stride, int64_t rows, const float* scales, const int32_t* sums,
                                const uint8_t* base, int64_t group_bytes, int64_t steps, float* out, int64_t out_stride) {
    int64_t row[M];
    for (int r = 0; r < M; ++r) row[r] = r < rows ? r : rows - 1;
    tw_v16 total[M][G];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) total[r][g] = tw_v16{};
    const uint8_t* const codes = base + tw_lines(F::scale_bytes(steps));
    constexpr int runs = 32 / F::run, quads = F::run / 4, shift = F::zero ? __builtin_ctz(F::zero | 1 << 30) : 0;
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
            for (int line = 0; line < F::code_bytes; line += 64)
                __builtin_prefetch(codes + g * group_bytes + step * F::code_bytes + line + G * group_bytes);
#pragma GCC unroll 2
        for (int run = 0; run < runs; ++run) {
            tw_i16 s[M][G];
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r) {
                const int32_t* const own = sums + row[r] * (stride / 16) + 2 * step;
                const int32_t sum = runs == 2 ? own[run] : own[0] + own[1];
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) s[r][g] = F::zero ? tw_splat_int(sum) << shift : tw_i16{};
            }
#pragma GCC unroll 8
            for (int q = 0; q < quads; ++q) {
                const int j = run * quads + q;
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) {
                    const tw_u32x16 w = F::codes(codes + g * group_bytes + step * F::code_bytes, j);
#pragma GCC unroll 8
                    for (int r = 0; r < M; ++r)
                        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(s[r][g])
                            : "v"(w), "m"(*(const tw_quad*)(a + row[r] * stride + 32 * step + 4 * j)));
                }
            }
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
                tw_v16 d, m;
                F::factors(base + g * group_bytes, runs * step + run, d, m);
#pragma GCC unroll 8
                for (int r = 0; r < M; ++r) {
                    const float scale = scales[row[r] * (stride / 32) + step];
                    if (F::offset) {
                        const int32_t* const own = sums + row[r] * (stride / 16) + 2 * step;
                        total[r][g] = tw_fma(m, tw_splat(scale * (float)-(own[0] + own[1])), total[r][g]);
                    }
                    total[r][g] = tw_fma(d * tw_splat(scale), tw_to_float(s[r][g]), total[r][g]);
                }
            }
        }
    }
    for (int r = 0; r < M && r < rows; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) tw_put(out + r * out_stride + 16 * g, total[r][g]);
}

template <class F, int G>
__attribute__((noinline)) static void tw_int8_rows(const int8_t* a, int64_t stride, int64_t rows, const float* scales,
                                                   const int32_t* sums, const uint8_t* base, int64_t group_bytes,
                                                   int64_t steps, float* out, int64_t out_stride) {
#define TW_TILE(M)                                                                                                   \
    tw_int8_tile<F, M, G>(a + r * stride, stride, rows - r, scales + r * (stride / 32), sums + r * (stride / 16), base, \
                          group_bytes, steps, out + r * out_stride, out_stride)
    for (int64_t r = 0; r < rows; r += 8) {
        if (rows - r == 1) TW_TILE(1);
        else if (rows - r == 2) TW_TILE(2);
        else if (rows - r <= 4) TW_TILE(4);
        else TW_TILE(8);
    }
#undef TW_TILE
}

template <class F>
static inline void tw_packed_int8(const int8_t* a, int64_t stride, int64_t rows, const float* scales, const int32_t* sums,
                                  const uint8_t* base, int64_t columns, int64_t steps, float* out, int64_t out_stride) {
    const int64_t group_bytes = tw_group_bytes<F>(steps), groups = tw_blocks(columns, 16);
    for (int64_t g = 0; g < groups;) {
        const uint8_t* const w = base + g * group_bytes;
        if (g + 2 <= groups) {
            tw_int8_rows<F, 2>(a, stride, rows, scales, sums, w, group_bytes, steps, out + 16 * g, out_stride);
            g += 2;
        } else {
            tw_int8_rows<F, 1>(a, stride, rows, scales, sums, w, group_bytes, steps, out + 16 * g, out_stride);
            g += 1;
        }
    }
}
#else
static constexpr bool tw_has_int8 = false;
static inline void tw_quantize_row(const float*, int64_t, int8_t*, float*, int32_t*) {}
template <class F>
static inline void tw_packed_int8(const int8_t*, int64_t, int64_t, const float*, const int32_t*, const uint8_t*, int64_t,
                                  int64_t, float*, int64_t) {}
#endif
