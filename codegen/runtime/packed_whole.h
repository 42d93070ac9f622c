// Products with weights in int8 that have one scale per row ("I8"): exact sums of int32 over all columns, scaled once.
//
// A row of activations is quantized as a whole, in 256 steps from its least number (or 0) to its greatest: a = scale *
// (q - zero), off by at most half a scale. One scale for both signs would waste a bit behind GELU (MiniLM's vectors: 6.6e-2
// of their length off instead of 3.8e-2, as with one scale for 128 columns, whose sums would have to leave the tiles).
// The epilogue makes product = (sum - zero * sum of the weight's row) * (scale * scale of the weight's row). Integers have
// one value, so AMX tiles, vpdpbusd and plain vectors give the same bits, and so does any number of rows.
//
//   a [rows / 16, tiles, 16, 64] uint8: tiles of 16 rows by 64 columns, room for whole 32 rows
//   w int8, per group of 16 rows: 16 scales, 16 sums of the codes, then `tiles` times 1024 bytes: byte b of lane l of line
//     j is column 4j + b, zeros up to whole tiles
//   out [rows up to whole 32, out_stride] int32, whole groups

struct tw_row_factors {
    static constexpr int run = 32;
    static constexpr bool scaled = true, offset = false;
    static int64_t scale_bytes(int64_t) { return 128; }
    static void factors(const uint8_t* scales, int64_t, tw_v16& d, tw_v16&) { d = tw_load((const float*)scales); }
    static float d_at(const uint8_t* scales, int64_t, int lane) { return tw_F32::at(scales, lane); }
    static float m_at(const uint8_t*, int64_t, int) { return 0.0f; }
};
struct tw_R16_I8 : tw_int8_codes<tw_row_factors> {};
// Whole tiles of 64 columns: an odd number of steps has 32 columns of zeros behind it.
template <> inline int64_t tw_group_bytes<tw_R16_I8>(int64_t steps) { return 128 + (steps + 1) / 2 * 1024; }

typedef int32_t tw_whole_sum __attribute__((may_alias));
typedef tw_i16 tw_i16_any __attribute__((aligned(1), may_alias));
typedef uint8_t tw_q16 __attribute__((vector_size(16)));
typedef tw_q16 tw_q16_any __attribute__((aligned(1), may_alias));
typedef int16_t tw_i16x32 __attribute__((vector_size(64)));

#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__clang__)
static inline bool tw_has_int8_tiles() { return tw_has_tiles; }
#else
static inline bool tw_has_int8_tiles() { return false; }
#endif

// Of row r, whose scale and zero are given, and column j, whose scale and sum are; the sum of products is sums[at].
static inline float tw_whole_product(const float* sums, int64_t at, float scale, int32_t zero, const float* column_scales,
                                     const float* column_sums, int64_t j) {
    const int32_t sum = ((const tw_whole_sum*)sums)[at] - zero * ((const tw_whole_sum*)column_sums)[j];
    return (float)sum * (scale * column_scales[j]);
}

// The scales of the columns of a block, one behind the other, and behind `block` of them the sums.
static inline void tw_whole_scales(const uint8_t* base, int64_t columns, int64_t steps, int64_t block, float* scales) {
    for (int64_t g = 0; g < tw_blocks(columns, 16); ++g) {
        const float* const own = (const float*)(base + g * tw_group_bytes<tw_R16_I8>(steps));
        tw_put(scales + 16 * g, tw_load(own));
        tw_put(scales + block + 16 * g, tw_load(own + 16));
    }
}

// The greatest lane of each of two vectors without a NaN, the second with its sign turned: -least.
static inline void tw_bounds(tw_v16 high, tw_v16 low, float& greatest, float& least) {
    const auto most = [](tw_v16 a, tw_v16 b) { return a > b ? a : b; };
    low = -low;
    const tw_v16 both = most(TW_SHUFFLE(high, low, TW_LOW), TW_SHUFFLE(high, low, TW_HIGH));  // 8 of each
    tw_v16 x = most(both, TW_SHUFFLE(both, both, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = most(x, TW_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    greatest = tw_most(x[0], x[1]);
    least = -tw_most(x[8], x[9]);
}

// 16 whole numbers as bytes; above 255 they are 255.
static inline tw_q16 tw_as_bytes(tw_i16 x) {
#if defined(__AVX512F__) && !defined(__clang__)
    return (tw_q16)__builtin_ia32_pmovusdb512_mask(x, tw_c16{}, tw_every);
#else
    return __builtin_convertvector(x < 255 ? x : tw_splat_int(255), tw_q16);
#endif
}

// Row `r` of a panel, `count` numbers (whole steps of 32), to its place in the tiles; its scale and its zero. The whole
// number stands in the low bits of its sum with 1.5 * 2^23. A row with an infinity or a NaN gets a NaN as its scale.
__attribute__((noinline)) static void tw_quantize_whole(const float* a, int64_t count, int64_t r, uint8_t* q,
                                                        float* scales, int32_t* zeros) {
    const int64_t tiles = tw_blocks(count, 64);
    q += (r / 16 * tiles * 16 + r % 16) * 64;
    tw_v16 most[2] = {}, least[2] = {}, nothing[2] = {};
    for (int64_t k = 0; k < count; k += 32)
        for (int i = 0; i < 2; ++i) {
            const tw_v16 x = tw_load(a + k + 16 * i);
            most[i] = x > most[i] ? x : most[i];
            least[i] = x < least[i] ? x : least[i];
            nothing[i] = tw_fma(x, tw_v16{}, nothing[i]);
        }
    float high, low;
    tw_bounds(most[0] > most[1] ? most[0] : most[1], least[0] < least[1] ? least[0] : least[1], high, low);
    tw_v16 none = nothing[0] + nothing[1];
    none += TW_SHUFFLE(none, none, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    none += TW_SHUFFLE(none, none, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    none += TW_SHUFFLE(none, none, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    const float scale = (high - low) / 255.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    const int32_t zero = (int32_t)tw_bits_of_float(12582912.0f - low * inverse) - 0x4b400000;
    const tw_i16 offset = tw_splat_int(zero - 0x4b400000);
    for (int64_t k = 0; k < count; k += 32)
        for (int i = 0; i < 2; ++i) {
            const tw_i16 codes = (tw_i16)(tw_load(a + k + 16 * i) * inverse + 12582912.0f) + offset;
            *(tw_q16_any*)(q + k / 64 * 1024 + k % 64 + 16 * i) = tw_as_bytes(codes);
        }
    scales[r] = scale + (none[0] + none[1]);
    zeros[r] = zero;
}

#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__clang__)
#define TW_LOAD_TILE(n, p, stride) asm volatile("tileloadd (%0,%1,1), %%tmm" #n ::"r"(p), "r"(stride) : "memory")
#define TW_STORE_TILE(n, p) asm volatile("tilestored %%tmm" #n ", (%0,%1,1)" ::"r"(p), "r"(out_line) : "memory")

// 32 rows against two groups: tiles 0 to 3 hold the sums, 4 and 5 the rows, 6 and 7 the weights. With every tile
// `lines` lines at `ahead` are asked for from beyond the L2 cache.
static inline void tw_whole_tile_of_32(const uint8_t* a, int64_t tiles, const uint8_t* w, int64_t group_bytes, int32_t* out,
                                       int64_t out_stride, const uint8_t* ahead, int64_t lines) {
    const int64_t line = 64, out_line = 4 * out_stride;
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
    for (int64_t t = 0; t < tiles; ++t) {
        TW_LOAD_TILE(6, w + 1024 * t, line);
        TW_LOAD_TILE(4, a + 1024 * t, line);
        TW_LOAD_TILE(5, a + 1024 * (tiles + t), line);
        for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(ahead + 64 * (t * lines + i), 0, 2);
        asm volatile("tdpbusd %%tmm6, %%tmm4, %%tmm0\n\ttdpbusd %%tmm6, %%tmm5, %%tmm2" ::: "memory");
        TW_LOAD_TILE(7, w + group_bytes + 1024 * t, line);
        asm volatile("tdpbusd %%tmm7, %%tmm4, %%tmm1\n\ttdpbusd %%tmm7, %%tmm5, %%tmm3" ::: "memory");
    }
    TW_STORE_TILE(0, out);
    TW_STORE_TILE(1, out + 16);
    TW_STORE_TILE(2, out + 16 * out_stride);
    TW_STORE_TILE(3, out + 16 * out_stride + 16);
}

// 16 rows against up to four groups: tiles 0 to 3 hold the sums, 4 the rows, 5 to 7 the weights in turn.
template <int G>
static inline void tw_whole_tile_of_16(const uint8_t* a, int64_t tiles, const uint8_t* w, int64_t group_bytes, int32_t* out,
                                       int64_t out_stride) {
    const int64_t line = 64, out_line = 4 * out_stride;
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
    for (int64_t t = 0; t < tiles; ++t) {
        const uint8_t* const own = w + 1024 * t;
        TW_LOAD_TILE(4, a + 1024 * t, line);
        TW_LOAD_TILE(5, own, line);
        asm volatile("tdpbusd %%tmm5, %%tmm4, %%tmm0" ::: "memory");
        if (G == 1) continue;
        TW_LOAD_TILE(6, own + group_bytes, line);
        asm volatile("tdpbusd %%tmm6, %%tmm4, %%tmm1" ::: "memory");
        if (G == 2) continue;
        TW_LOAD_TILE(7, own + 2 * group_bytes, line);
        asm volatile("tdpbusd %%tmm7, %%tmm4, %%tmm2" ::: "memory");
        TW_LOAD_TILE(5, own + 3 * group_bytes, line);
        asm volatile("tdpbusd %%tmm5, %%tmm4, %%tmm3" ::: "memory");
    }
    TW_STORE_TILE(0, out);
    if (G > 1) TW_STORE_TILE(1, out + 16);
    if (G > 2) TW_STORE_TILE(2, out + 32);
    if (G > 2) TW_STORE_TILE(3, out + 48);
}
#undef TW_LOAD_TILE
#undef TW_STORE_TILE

// ahead: how many lines of the next columns every tile of weights brings along (tw_whole_ahead).
static bool tw_whole_by_tiles(const uint8_t* a, int64_t tiles, int64_t rows, int64_t first, int64_t ahead,
                              const uint8_t* w, int64_t group_bytes, int64_t groups, int32_t* out, int64_t out_stride) {
    if (!tw_has_int8_tiles()) return false;
    const uint8_t* next = w + groups * group_bytes + first / 32 * (groups / 2) * tiles * ahead * 64;
    for (int64_t r = 0; r < rows; r += 32) {
        const uint8_t* const own = a + r * tiles * 64;
        int32_t* const to = out + r * out_stride;
        const bool single = rows - r <= 16;
        int64_t g = 0;
        for (; single && g + 4 <= groups; g += 4)
            tw_whole_tile_of_16<4>(own, tiles, w + g * group_bytes, group_bytes, to + 16 * g, out_stride);
        for (; !single && g + 2 <= groups; g += 2, next += tiles * ahead * 64)
            tw_whole_tile_of_32(own, tiles, w + g * group_bytes, group_bytes, to + 16 * g, out_stride, next, ahead);
        for (; single && g + 2 <= groups; g += 2)
            tw_whole_tile_of_16<2>(own, tiles, w + g * group_bytes, group_bytes, to + 16 * g, out_stride);
        for (; g < groups; ++g) {
            tw_whole_tile_of_16<1>(own, tiles, w + g * group_bytes, group_bytes, to + 16 * g, out_stride);
            if (!single)
                tw_whole_tile_of_16<1>(own + 1024 * tiles, tiles, w + g * group_bytes, group_bytes,
                                       to + 16 * out_stride + 16 * g, out_stride);
        }
    }
    return true;
}
#else
static bool tw_whole_by_tiles(const uint8_t*, int64_t, int64_t, int64_t, int64_t, const uint8_t*, int64_t, int64_t,
                              int32_t*, int64_t) {
    return false;
}
#endif

// Four bytes of every lane times the four bytes (without a sign) at `a`, added to the lane.
#if defined(__AVX512VNNI__) && !defined(__clang__)
static inline tw_i16 tw_whole_add(tw_i16 s, tw_u32x16 w, const uint8_t* a) {
    asm("vpdpbusd %2, %1, %0" : "+v"(s) : "v"(tw_splat_int(*(const tw_whole_sum*)a)), "v"(w));
    return s;
}
#else
// The sums of the two products of every lane. Of bytes they fit: 2 * 255 * 127.
static inline tw_i16 tw_pair_products(tw_i16x32 x, tw_i16x32 y) {
#if defined(__AVX2__)
    typedef int16_t half __attribute__((vector_size(32)));
    struct halves { half low, high; };
    const halves a = __builtin_bit_cast(halves, x), b = __builtin_bit_cast(halves, y);
    struct { half low, high; } z = {(half)__builtin_ia32_pmaddwd256(a.low, b.low),
                                    (half)__builtin_ia32_pmaddwd256(a.high, b.high)};
    return __builtin_bit_cast(tw_i16, z);
#else
    const tw_i16 a = (tw_i16)x, b = (tw_i16)y;
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
static inline tw_i16 tw_whole_add(tw_i16 s, tw_u32x16 w, const uint8_t* a) {
    const tw_i16x32 x = (tw_i16x32)w, y = (tw_i16x32)tw_splat_int(*(const tw_whole_sum*)a);
    return s + tw_pair_products(x << 8 >> 8, y & 255) + tw_pair_products(x >> 8, y >> 8 & 255);
}
#endif

// Rows `r` to r + R - 1 of a tile against G groups, without tiles.
template <int R, int G>
static inline void tw_whole_by_vectors(const uint8_t* a, int64_t tiles, int64_t r, int64_t rows, const uint8_t* w,
                                       int64_t group_bytes, int32_t* out, int64_t out_stride) {
    const uint8_t* ar[R];
    tw_i16 s[R][G];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
        const int64_t row = tw_least(r + i, rows - 1);
        ar[i] = a + (row / 16 * tiles * 16 + row % 16) * 64;
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) s[i][g] = tw_i16{};
    }
    for (int64_t t = 0; t < tiles; ++t)
#pragma GCC unroll 1
        for (int j = 0; j < 16; ++j) {
            tw_u32x16 x[G];
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) x[g] = tw_words(w + g * group_bytes + 1024 * t + 64 * j);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) s[i][g] = tw_whole_add(s[i][g], x[g], ar[i] + 1024 * t + 4 * j);
        }
    for (int i = 0; i < R && r + i < rows; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) *(tw_i16_any*)(out + (r + i) * out_stride + 16 * g) = s[i][g];
}

// The sums of rows `first` (of a whole tile) to `end` of a panel of `count` with the columns of a block. Between
// tw_tiles_on and tw_tiles_off. Of many rows each tile of 32 brings its share of the next columns to the L2 cache: products
// with 10 MB of weights one after the other take 8 % less with 128 rows and 9 % with 256; with 32 the lines are late.
__attribute__((noinline)) static void tw_packed_whole(const uint8_t* a, int64_t first, int64_t end, int64_t count,
                                                      const uint8_t* base, int64_t columns, int64_t steps, float* to,
                                                      int64_t out_stride) {
    const int64_t groups = tw_blocks(columns, 16), tiles = tw_blocks(steps, 2), rows = end - first;
    const int64_t group_bytes = tw_group_bytes<tw_R16_I8>(steps);
    const uint8_t* const w = base + 128;
    int32_t* const out = (int32_t*)to;
    a += first * tiles * 64;
    const int64_t ahead = count >= 128 ? tw_blocks(32, count / 32) : 0;
    if (tw_whole_by_tiles(a, tiles, rows, first, ahead, w, group_bytes, groups, out, out_stride)) return;
    int64_t g = 0;
    for (; g + 2 <= groups; g += 2)
        for (int64_t r = 0; r < rows; r += 4)
            tw_whole_by_vectors<4, 2>(a, tiles, r, rows, w + g * group_bytes, group_bytes, out + 16 * g, out_stride);
    for (; g < groups; ++g)
        for (int64_t r = 0; r < rows; r += 4)
            tw_whole_by_vectors<4, 1>(a, tiles, r, rows, w + g * group_bytes, group_bytes, out + 16 * g, out_stride);
}
