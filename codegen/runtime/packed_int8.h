// Products of a few rows in int8 with packed weights: exact sums of 16 or 32 columns, scaled in float.
//
// A row is quantized in blocks of 32: scale = greatest / 127, q = a / scale to nearest, so that a number is off by at
// most half a scale. total = fma(scale, d * sum of q * code + m * sum of q, total), k ascending: a row has the same
// bits for any number of rows.
//
// The sum of q * code starts at the bits of the float 1.5 * 2^23, so that it ends as those of that float plus the sum:
// fma(d, it, m * sum of q - d * 1.5 * 2^23) needs no conversion, and what is subtracted is the same for all rows but
// for m. It is exact without an offset; an offset's part is off by less than d, where rounding 32 numbers is off by
// about 7 d.
//
// AMX tiles were tried (TDPBSSD, bit for bit the same): sums of 32 columns must leave the tile to be scaled, through
// the L1 cache, and nibbles must enter it the same way. Alone the three pieces of a block of 16 by 32 in Q4_1 take 3 ns
// (unpacking), 8 to 10 (tiles) and 8 (scaling) for 8 rows, together 24 to 34, however far apart the pieces of one block
// stand; vpdpbusd takes 18 (Sapphire Rapids). Its ports set that limit: 64 of it, 25 to scale the sums and 12 to
// unpack, two a cycle.
//
//   Rows come in tiles of 16; of every tile, for each step of 32 columns:
//   q [16, 32] int8    scales [16]    whole [16] sum of q    sums [2, 16] int32: minus the sums of 16 q

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(__clang__)
static constexpr bool tw_has_int8 = true;
typedef int32_t tw_quad __attribute__((may_alias));

// The greatest lanes of four vectors, joined as tw_sum_lanes joins sums.
static inline void tw_greatest_lanes(const tw_i16* x, int32_t* out) {
    const auto most = [](tw_i16 a, tw_i16 b) { return a > b ? a : b; };
    const tw_i16 first = most(TW_SHUFFLE(x[0], x[1], TW_LOW), TW_SHUFFLE(x[0], x[1], TW_HIGH));
    const tw_i16 second = most(TW_SHUFFLE(x[2], x[3], TW_LOW), TW_SHUFFLE(x[2], x[3], TW_HIGH));
    tw_i16 four = most(TW_SHUFFLE(first, second, TW_EVEN), TW_SHUFFLE(first, second, TW_ODD));
    four = most(four, TW_SHUFFLE(four, four, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    four = most(four, TW_SHUFFLE(four, four, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    for (int i = 0; i < 4; ++i) out[i] = four[4 * i];
}

// Numbers times `inverse` to nearest, as 16 bytes: the whole number stands in the low bits of its sum with 1.5 * 2^23.
// What is not finite becomes any byte; the scale of its step is not finite.
static inline tw_c16 tw_nearest_codes(tw_v16 x, float inverse) {
    const tw_v16 y = x * inverse + 12582912.0f;
    return (tw_c16)__builtin_ia32_pmovdb512_mask((tw_i16)y, tw_c16{}, tw_every);
}

// Row `r` of a panel, up to 16 steps at a time: each of its parts works on vectors of steps, so that no chain of
// shuffles and divisions stands between two steps (17 ns a step became 9). The first row of a tile clears the scales of
// the others: kernels may compute rows nobody filled.
__attribute__((noinline)) static void tw_quantize_row(const float* a, int64_t count, int64_t r, int8_t* q,
                                                      float* scales, float* whole, int32_t* sums) {
    typedef int32_t quads __attribute__((vector_size(16)));
    const int64_t steps = count / 32, lane = r % 16;
    q += (r / 16 * steps * 16 + lane) * 32;
    scales += r / 16 * steps * 16;
    whole += r / 16 * steps * 16;
    sums += r / 16 * steps * 32;
    for (int64_t first = 0; first < steps; first += 16) {
        const int64_t here = tw_least<int64_t>(16, steps - first);
        alignas(64) int32_t tops[16] = {}, halves[2][16] = {};
        alignas(64) float scale[16], inverse[16], total[16];
        // As integers the absolute values have the same order, and a NaN is greater than all.
        for (int64_t s = 0; s < here; s += 4) {
            tw_i16 top[4];
            for (int64_t i = 0; i < 4; ++i) {
                const float* const from = a + 32 * (first + tw_least(s + i, here - 1));
                const tw_i16 x = (tw_i16)tw_load(from) & 0x7fffffff, y = (tw_i16)tw_load(from + 16) & 0x7fffffff;
                top[i] = x > y ? x : y;
            }
            tw_greatest_lanes(top, tops + s);
        }
        const tw_v16 greatest = tw_load((const float*)tops);
        tw_put(scale, greatest / 127.0f);
        tw_put(inverse, greatest > 0.0f ? 127.0f / greatest : tw_v16{});
        for (int64_t s = 0; s < here; ++s) {
            for (int half = 0; half < 2; ++half) {
                const tw_c16 codes = tw_nearest_codes(tw_load(a + 32 * (first + s) + 16 * half), inverse[s]);
                *(tw_c16_any*)(q + 512 * (first + s) + 16 * half) = codes;
                quads sum = {};
                asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(quads{} + 0x01010101), "v"(codes));
                sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1);
                halves[half][s] = sum[0] + sum[1];
            }
        }
        const tw_u32x16 both = tw_words((const uint8_t*)halves[0]) + tw_words((const uint8_t*)halves[1]);
        tw_put(total, tw_to_float((tw_i16)both));
        for (int64_t s = 0; s < here; ++s) {
            const int64_t at = 16 * (first + s);
            if (lane == 0) {
                tw_put(scales + at, tw_v16{});
                tw_put(whole + at, tw_v16{});
            }
            scales[at + lane] = scale[s];
            whole[at + lane] = total[s];
            sums[2 * at + lane] = -halves[0][s];
            sums[2 * at + 16 + lane] = -halves[1][s];
        }
    }
}

// A number of a row in every lane, loaded where it is used (packed_matmul.h says why).
static inline tw_i16 tw_splat_word(const int32_t* x) {
    tw_i16 y;
    asm("vpbroadcastd %1, %0" : "=v"(y) : "m"(*x));
    return y;
}

// What the sums of the rows of a step start from: 1.5 * 2^23 as bits, minus Zero * sum of q. `start` [2, 16]: of 16
// columns each; where a step is one run, `start` [0] is that of 32.
template <int Zero, int Runs> static inline void tw_int8_start(const int32_t* sums, int32_t* start) {
    const tw_u32x16 low = tw_words((const uint8_t*)sums), high = tw_words((const uint8_t*)(sums + 16));
    const tw_u32x16 bits = tw_all(0x4b400000u);
    *(tw_u32x16_any*)start = bits + (Runs == 2 ? low : low + high) * Zero;
    if (Runs == 2) *(tw_u32x16_any*)(start + 16) = bits + high * Zero;
}

// M rows of a tile against G groups with vpdpbusd: bytes q + zero without a sign, times `a`.
template <class F, int M, int G>
static inline void tw_int8_tile(const int8_t* a, int64_t rows, const float* scales, const float* whole,
                                const int32_t* sums, const uint8_t* base, int64_t group_bytes, int64_t steps,
                                float* out, int64_t out_stride) {
    tw_v16 total[M][G];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) total[r][g] = tw_v16{};
    const uint8_t* const codes = base + tw_lines(F::scale_bytes(steps));
    constexpr int runs = 32 / F::run, quads = F::run / 4;
    alignas(64) int32_t start[32];
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
            for (int line = 0; line < F::code_bytes; line += 64)
                __builtin_prefetch(codes + g * group_bytes + step * F::code_bytes + line + G * group_bytes);
        if (F::zero) tw_int8_start<F::zero, runs>(sums + 32 * step, start);
#pragma GCC unroll 2
        for (int run = 0; run < runs; ++run) {
            tw_i16 s[M][G];
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g)
                    s[r][g] = F::zero ? tw_splat_word(start + 16 * run + r) : (tw_i16)tw_all(0x4b400000u);
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
                const tw_v16 rest = d * tw_splat(-12582912.0f);
#pragma GCC unroll 8
                for (int r = 0; r < M; ++r) {
                    const tw_v16 other = F::offset ? tw_fma_at(whole + 16 * step + r, m, rest) : rest;
                    total[r][g] = tw_fma_at(scales + 16 * step + r, tw_fma(d, (tw_v16)s[r][g], other), total[r][g]);
                }
            }
        }
    }
    for (int r = 0; r < M && r < rows; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) tw_put(out + r * out_stride + 16 * g, total[r][g]);
}

// Up to 16 rows, those of one tile, against all columns of a block. Eight rows meet one group at a time: sums and
// totals of two need more registers than there are.
template <class F>
__attribute__((noinline)) static void tw_int8_rows(const int8_t* a, int64_t rows, const float* scales,
                                                   const float* whole, const int32_t* sums, const uint8_t* base,
                                                   int64_t groups, int64_t steps, float* out, int64_t out_stride) {
    const int64_t group_bytes = tw_group_bytes<F>(steps);
#define TW_TILE(M, G, at)                                                                                           \
    tw_int8_tile<F, M, G>(a + 32 * r, rows - r, scales + r, whole + r, sums + r, base + (at) * group_bytes,         \
                          group_bytes, steps, out + r * out_stride + 16 * (at), out_stride)
    // Five rows as four and one: Q4_1 15 ns a block of 16 by 32 instead of 18. Larger codes are not read twice.
    constexpr int64_t most_in_fours = F::code_bytes <= 256 ? 5 : 4;
    for (int64_t g = 0; g < groups; g += 2) {
        const int64_t end = tw_least(g + 2, groups);
        for (int64_t r = 0; r < rows;) {
            if (rows - r > most_in_fours) {
                for (int64_t one = g; one < end; ++one) TW_TILE(8, 1, one);
                r += 8;
            } else if (g + 2 > groups) TW_TILE(1, 1, g), r += 1;
            else if (rows - r == 1) TW_TILE(1, 2, g), r += 1;
            else if (rows - r == 2) TW_TILE(2, 2, g), r += 2;
            else TW_TILE(4, 2, g), r += 4;
        }
    }
#undef TW_TILE
}

template <class F>
static inline void tw_packed_int8(const int8_t* a, int64_t rows, const float* scales, const float* whole,
                                  const int32_t* sums, const uint8_t* base, int64_t columns, int64_t steps, float* out,
                                  int64_t out_stride) {
    const int64_t groups = tw_blocks(columns, 16);
    for (int64_t r = 0; r < rows; r += 16) {
        const int64_t panel = r * steps, count = tw_least<int64_t>(16, rows - r);
        float* const to = out + r * out_stride;
        tw_int8_rows<F>(a + 32 * panel, count, scales + panel, whole + panel, sums + 2 * panel, base, groups, steps,
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
