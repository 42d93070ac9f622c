// Products of a few rows in int8 with packed weights: exact sums of 16 or 32 columns, scaled in float.
//
// A row is quantized in blocks of 32: scale = greatest / 127, q = a / scale to nearest, so that a number is off by at
// most half a scale. total = fma(d * scale, sum of q * code, fma(m, scale * sum of q, total)), k ascending: a row has
// the same bits for any number of rows.
//
// AMX tiles were tried (TDPBSSD, bit for bit the same): sums of 32 columns must leave the tile to be scaled, through
// the L1 cache, and nibbles must enter it the same way. A product of 16 rows takes 10 ns, reading its sums back 8 and
// unpacking 6: not faster than vpdpbusd for 8 rows, and from 1.2 times as fast to 1.7 times as slow for 16 (Sapphire
// Rapids, a busy machine).
//
//   Rows come in tiles of 16; of every tile, for each step of 32 columns:
//   q [16, 32] int8    scales [16]    offsets [16] scale * sum of q    sums [2, 16] int32: minus the sums of 16 q

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

// The sums of two times 16 bytes.
static inline void tw_sum_codes(const int8_t* q, int32_t* halves) {
    typedef int32_t quads __attribute__((vector_size(32)));
    typedef quads quads_any __attribute__((aligned(1), may_alias));
    quads x = {};
    asm("vpdpbusd %2, %1, %0" : "+v"(x) : "v"((quads{} + 0x01010101)), "v"(*(const quads_any*)q));
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
    halves[0] = x[0] + x[1];
    halves[1] = x[4] + x[5];
}

// Row `r` of a panel. The first row of a tile clears the scales of the others: kernels may compute rows nobody filled.
static inline void tw_quantize_row(const float* a, int64_t count, int64_t r, int8_t* q, float* scales, float* offsets,
                                   int32_t* sums) {
    typedef int8_t bytes __attribute__((vector_size(16), aligned(1), may_alias));
    const auto most = [](tw_i16 x, tw_i16 y) { return x > y ? x : y; };
    const tw_v16 round = tw_splat(12582912.0f);  // 1.5 * 2^23: the integer stands in the low bits of the sum
    const int64_t steps = count / 32, lane = r % 16;
    q += (r / 16 * steps * 16 + lane) * 32;
    scales += r / 16 * steps * 16;
    offsets += r / 16 * steps * 16;
    sums += r / 16 * steps * 32 + lane;
    for (int64_t step = 0; step < steps; ++step) {
        const tw_v16 x[2] = {tw_load(a + 32 * step), tw_load(a + 32 * step + 16)};
        // As integers the absolute values have the same order, and a NaN is greater than all.
        const tw_i16 top = tw_join_lanes(most((tw_i16)x[0] & 0x7fffffff, (tw_i16)x[1] & 0x7fffffff), most);
        const float greatest = ((tw_v16)top)[0];
        const float inverse = greatest > 0 ? 127.0f / greatest : 0.0f;
        for (int half = 0; half < 2; ++half) {
            // The greatest may come out a little above 127. An infinity or a NaN goes into the sum with the scale.
            const tw_v16 y = x[half] * inverse, low = y > -127.0f ? y : tw_splat(-127.0f);
            const tw_v16 near = low < 127.0f ? low : tw_splat(127.0f);
            const tw_i16 whole = (tw_i16)(near + round) - 0x4b400000;
            *(bytes*)(q + 512 * step + 16 * half) = __builtin_convertvector(whole, bytes);
        }
        int32_t halves[2];
        tw_sum_codes(q + 512 * step, halves);
        sums[32 * step] = -halves[0];
        sums[32 * step + 16] = -halves[1];
        if (lane == 0) {
            tw_put(scales + 16 * step, tw_v16{});
            tw_put(offsets + 16 * step, tw_v16{});
        }
        const float scale = greatest / 127.0f;
        scales[16 * step + lane] = scale;
        offsets[16 * step + lane] = scale * (float)(halves[0] + halves[1]);
    }
}

// M rows of a tile against G groups with vpdpbusd: bytes q + zero without a sign, times `a`.
template <class F, int M, int G>
static inline void tw_int8_tile(const int8_t* a, int64_t rows, const float* scales, const float* offsets,
                                const int32_t* sums, const uint8_t* base, int64_t group_bytes, int64_t steps,
                                float* out, int64_t out_stride) {
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
                const int32_t* const own = sums + 32 * step + r;
                const int32_t sum = runs == 2 ? own[16 * run] : own[0] + own[16];
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
                            : "v"(w), "m"(*(const tw_quad*)(a + 512 * step + 32 * r + 4 * j)));
                }
            }
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
                tw_v16 d, m;
                F::factors(base + g * group_bytes, runs * step + run, d, m);
#pragma GCC unroll 8
                for (int r = 0; r < M; ++r) {
                    if (F::offset) total[r][g] = tw_fma(m, tw_splat(offsets[16 * step + r]), total[r][g]);
                    total[r][g] = tw_fma(d * tw_splat(scales[16 * step + r]), tw_to_float(s[r][g]), total[r][g]);
                }
            }
        }
    }
    for (int r = 0; r < M && r < rows; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) tw_put(out + r * out_stride + 16 * g, total[r][g]);
}

// Up to 16 rows, those of one tile, against all columns of a block.
template <class F>
__attribute__((noinline)) static void tw_int8_rows(const int8_t* a, int64_t rows, const float* scales,
                                                   const float* offsets, const int32_t* sums, const uint8_t* base,
                                                   int64_t groups, int64_t steps, float* out, int64_t out_stride) {
    const int64_t group_bytes = tw_group_bytes<F>(steps);
#define TW_TILE(M, G)                                                                                               \
    tw_int8_tile<F, M, G>(a + 32 * r, rows - r, scales + r, offsets + r, sums + r, w, group_bytes, steps,          \
                          out + r * out_stride + 16 * g, out_stride)
    for (int64_t g = 0; g < groups; g += 2) {
        const uint8_t* const w = base + g * group_bytes;
        for (int64_t r = 0; r < rows;) {
            if (g + 2 > groups) TW_TILE(1, 1), r += 1;
            else if (rows - r == 1) TW_TILE(1, 2), r += 1;
            else if (rows - r == 2) TW_TILE(2, 2), r += 2;
            else if (rows - r > 4) TW_TILE(8, 2), r += 8;
            else TW_TILE(4, 2), r += 4;
        }
    }
#undef TW_TILE
}

template <class F>
static inline void tw_packed_int8(const int8_t* a, int64_t rows, const float* scales, const float* offsets,
                                  const int32_t* sums, const uint8_t* base, int64_t columns, int64_t steps, float* out,
                                  int64_t out_stride) {
    const int64_t groups = tw_blocks(columns, 16);
    for (int64_t r = 0; r < rows; r += 16) {
        const int64_t panel = r * steps, count = tw_least<int64_t>(16, rows - r);
        float* const to = out + r * out_stride;
        tw_int8_rows<F>(a + 32 * panel, count, scales + panel, offsets + panel, sums + 2 * panel, base, groups, steps,
                        to, out_stride);
    }
}
#else
static constexpr bool tw_has_int8 = false;
static inline void tw_quantize_row(const float*, int64_t, int64_t, int8_t*, float*, float*, int32_t*) {}
template <class F>
static inline void tw_packed_int8(const int8_t*, int64_t, const float*, const float*, const int32_t*, const uint8_t*,
                                  int64_t, int64_t, float*, int64_t) {}
#endif
