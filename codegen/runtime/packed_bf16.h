// Products of many rows with packed weights in bfloat16, sums in float: with AMX tiles, or with vdpbf16ps.
//
// The weights of a block of columns are unpacked once, d * q + m rounded to bfloat16, in pairs of columns k, k + 1: one
// line of 64 bytes holds a pair of 16 rows, 16 lines make the 1024 bytes of a tile (32 columns by 16 rows of the weight).
// Weights in bfloat16 are packed like that and read where they lie.
//   a [rows / 16, stride / 32, 16, 32] bfloat16: tiles of 16 rows by 32 columns, each in one piece (1.3 times as fast as
//     rows with AMX); zeros up to whole steps of 32, room for a whole number of 32 rows
//   out [rows up to whole 32, out_stride], whole groups    room [groups * steps * 1024] bytes, on a line
// The caller unpacks once (tw_bf16_weights) and goes through its rows in pieces of tw_bf16_piece, each with what is to
// be done to its sums: they are still in the L1 cache then.

static constexpr int tw_bf16_step_bytes = 1024;

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__clang__)
static constexpr bool tw_has_bf16 = true;
typedef uint32_t tw_pair __attribute__((may_alias));
typedef uint16_t tw_u16x32 __attribute__((vector_size(64)));
typedef uint16_t tw_u16x16 __attribute__((vector_size(32)));
typedef tw_u16x16 tw_u16x16_any __attribute__((aligned(1), may_alias));
typedef tw_u16x32 tw_u16x32_any __attribute__((aligned(1), may_alias));

// Two vectors of 16 numbers, rounded, one behind the other.
static inline tw_u16x32 tw_halves(tw_v16 first, tw_v16 second) {
    tw_u16x32 x;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(x) : "v"(second), "v"(first));
    return x;
}
// The same as 16 pairs.
static inline tw_u16x32 tw_pairs(tw_v16 first, tw_v16 second) {
    return __builtin_shuffle(tw_halves(first, second), (tw_u16x32){0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
}

// Row `r` of a panel, rounded to its place in the tiles.
static inline void tw_round_row(const float* a, int64_t count, int64_t r, uint16_t* to) {
    to += r / 16 * 16 * count + r % 16 * 32;
    for (int64_t k = 0; k < count; k += 32)
        *(tw_u16x32_any*)(to + 16 * k) = tw_halves(tw_load(a + k), tw_load(a + k + 16));
}

// Numbers below 2^-126 become 0, as in every product in bfloat16.
static inline void tw_store_bf16(const float* a, int64_t count, uint16_t* to) {
    int64_t k = 0;
    for (; k + 32 <= count; k += 32) *(tw_u16x32_any*)(to + k) = tw_halves(tw_load(a + k), tw_load(a + k + 16));
    for (; k < count; ++k) to[k] = tw_to_bf16(a[k]);
}

// A row that was rounded when it was stored.
static inline void tw_round_row(const uint16_t* a, int64_t count, int64_t r, uint16_t* to) {
    to += r / 16 * 16 * count + r % 16 * 32;
    for (int64_t k = 0; k < count; k += 32) *(tw_u16x32_any*)(to + 16 * k) = *(const tw_u16x32_any*)(a + k);
}

template <class F> static inline void tw_fill_bf16(const uint8_t* group, int64_t steps, uint8_t* to) {
    const uint8_t* const codes = group + tw_lines(F::scale_bytes(steps));
    constexpr int runs = 32 / F::run, quads = F::run / 4;
    for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 2
        for (int run = 0; run < runs; ++run) {
            tw_v16 d, m;
            tw_centered_factors<F>(group, runs * step + run, d, m);
#pragma GCC unroll 8
            for (int q = 0; q < quads; ++q) {
                const int j = run * quads + q;
                tw_v16 w[4];
                F::unpack(codes + step * F::code_bytes, j, w);
                for (int b = 0; b < 4; ++b)
                    if (F::scaled) w[b] = F::offset ? tw_fma(d, w[b], m) : d * w[b];
                tw_u16x32_any* const line = (tw_u16x32_any*)(to + step * tw_bf16_step_bytes + 128 * j);
                line[0] = tw_pairs(w[0], w[1]);
                line[1] = tw_pairs(w[2], w[3]);
            }
        }
}

// Rows `r` to r + R - 1 against G groups with vdpbf16ps.
template <int R, int G>
static inline void tw_bf16_tile(const uint16_t* a, int64_t stride, int64_t r, int64_t rows, const uint8_t* w,
                                int64_t steps, float* out, int64_t out_stride) {
    const uint16_t* ar[R];
    for (int i = 0; i < R; ++i) {
        const int64_t row = tw_least(r + i, rows - 1);
        ar[i] = a + row / 16 * 16 * stride + row % 16 * 32;
    }
    tw_v16 s[R][G];
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) s[i][g] = tw_v16{};
    for (int64_t pair = 0; pair < 16 * steps; ++pair) {
        const int64_t at = pair / 16 * 512 + pair % 16 * 2;
        tw_v16 wk[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) wk[g] = tw_load((const float*)(w + g * steps * tw_bf16_step_bytes + 64 * pair));
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g)
                asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(s[i][g]) : "v"(wk[g]), "m"(*(const tw_pair*)(ar[i] + at)));
    }
    for (int i = 0; i < R && r + i < rows; ++i)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) tw_put(out + (r + i) * out_stride + 16 * g, s[i][g]);
}

#if defined(__AMX_BF16__) && defined(__AMX_TILE__)
// Linux hands out the tile registers on request, once per process (arch_prctl: ARCH_REQ_XCOMP_PERM, XTILEDATA).
static bool tw_ask_for_tiles() {
    int64_t result = 158;
    asm volatile("syscall" : "+a"(result) : "D"(0x1023l), "S"(18l) : "rcx", "r11", "memory");
    return result == 0;
}
static const bool tw_has_tiles = tw_ask_for_tiles();

struct tw_tile_shape { uint8_t palette, start; uint8_t unused[14]; uint16_t line[16]; uint8_t lines[16]; };
static const tw_tile_shape tw_tiles_of_16 = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// 32 rows against G groups: tiles 0 to 3 hold the sums, 4 and 5 the rows, 6 and 7 the weights. The rows stay in the L1
// cache for all groups; the weights only pass, which tileloaddt1 says (K of 576, one core: 81 % of what tdpbf16ps can
// do, 67 % without). With every step `lines` lines at `ahead` are asked for from beyond the L2 cache.
template <int G>
static inline void tw_amx_tile(const uint16_t* a, int64_t stride, const uint8_t* w, int64_t steps, float* out,
                               int64_t out_stride, const uint8_t* ahead, int64_t lines) {
    const int64_t line = 64, out_line = 4 * out_stride;
    asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
    for (int64_t step = 0; step < steps; ++step) {
        const uint8_t* const own = w + step * tw_bf16_step_bytes;
        asm volatile("tileloaddt1 (%0,%1,1), %%tmm6" ::"r"(own), "r"(line) : "memory");
        asm volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(a + 512 * step), "r"(line) : "memory");
        asm volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(a + 512 * step + 16 * stride), "r"(line) : "memory");
        for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(ahead + 64 * (step * lines + i), 0, 2);
        asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm6, %%tmm5, %%tmm2" ::: "memory");
        if (G == 2) {
            asm volatile("tileloaddt1 (%0,%1,1), %%tmm7" ::"r"(own + steps * tw_bf16_step_bytes), "r"(line) : "memory");
            asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::: "memory");
        }
    }
    asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(out), "r"(out_line) : "memory");
    asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(out + 16 * out_stride), "r"(out_line) : "memory");
    if (G == 2) {
        asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(out + 16), "r"(out_line) : "memory");
        asm volatile("tilestored %%tmm3, (%0,%1,1)" ::"r"(out + 16 * out_stride + 16), "r"(out_line) : "memory");
    }
}

static inline void tw_tiles_on() {
    if (tw_has_tiles) asm volatile("ldtilecfg %0" ::"m"(tw_tiles_of_16) : "memory");
}
static inline void tw_tiles_off() {
    if (tw_has_tiles) asm volatile("tilerelease" ::: "memory");
}

// Between tw_tiles_on and tw_tiles_off. lines: see tw_bf16_lines; ahead: where those of these rows begin.
static void tw_amx_rows(const uint16_t* a, int64_t stride, int64_t rows, const uint8_t* w, int64_t groups,
                        int64_t steps, float* out, int64_t out_stride, const uint8_t* ahead = nullptr, int64_t lines = 0) {
    for (int64_t r = 0; r < rows; r += 32)
        for (int64_t g = 0; g < groups; g += 2, ahead += steps * lines * 64) {
            const uint8_t* const own = w + g * steps * tw_bf16_step_bytes;
            float* const to = out + r * out_stride + 16 * g;
            if (g + 2 <= groups) tw_amx_tile<2>(a + r * stride, stride, own, steps, to, out_stride, ahead, lines);
            else tw_amx_tile<1>(a + r * stride, stride, own, steps, to, out_stride, ahead, lines);
        }
}

static bool tw_amx_matmul(const uint16_t* a, int64_t stride, int64_t rows, const uint8_t* w, int64_t groups,
                          int64_t steps, float* out, int64_t out_stride) {
    if (!tw_has_tiles) return false;
    tw_tiles_on();
    tw_amx_rows(a, stride, rows, w, groups, steps, out, out_stride);
    tw_tiles_off();
    return true;
}
#else
static constexpr bool tw_has_tiles = false;
static inline void tw_tiles_on() {}
static inline void tw_tiles_off() {}
static void tw_amx_rows(const uint16_t*, int64_t, int64_t, const uint8_t*, int64_t, int64_t, float*, int64_t,
                        const uint8_t*, int64_t) {}
static bool tw_amx_matmul(const uint16_t*, int64_t, int64_t, const uint8_t*, int64_t, int64_t, float*, int64_t) {
    return false;
}
#endif

// Rows of a piece: what the tiles of AMX take at once; six at a time with vdpbf16ps, whole tiles of 16.
static const int64_t tw_bf16_piece = tw_has_tiles ? 32 : 48;

// The weights of `columns` columns as tiles, in `room` unless they lie like that already.
template <class F>
static inline const uint8_t* tw_bf16_weights(const uint8_t* base, int64_t columns, int64_t steps, uint8_t* room) {
    if constexpr (!F::scaled)
        if (F::paired) return base;
    const int64_t group_bytes = tw_group_bytes<F>(steps), groups = tw_blocks(columns, 16);
    for (int64_t g = 0; g < groups; ++g)
        tw_fill_bf16<F>(base + g * group_bytes, steps, room + g * steps * tw_bf16_step_bytes);
    return room;
}

// Piece `piece` of `rows` rows brings as large a part of the next `columns` columns to the L2 cache: worth 4 % of a
// product of 512 rows by 3072 columns in Q4_1. Weights that are read where they lie get slower (MiniLM: 3 %).
template <class F>
static inline void tw_bf16_ahead(const uint8_t* base, int64_t columns, int64_t steps, int64_t piece, int64_t rows) {
    const int64_t bytes = tw_blocks(columns, 16) * tw_group_bytes<F>(steps);
    const int64_t end = bytes * tw_least(piece + tw_bf16_piece, rows) / rows;
    for (int64_t at = bytes * piece / rows; at < end; at += 64) __builtin_prefetch(base + bytes + at, 0, 2);
}

// Lines of the next columns that each tile of 32 of `rows` rows asks for with every step, where weights are read where
// they lie. Products with 21 MB of weights one after the other take 6 % less with 128 and 256 rows; with 32 they come late.
static inline int64_t tw_bf16_lines(int64_t rows) { return tw_has_tiles && rows >= 128 ? tw_blocks(32, rows / 32) : 0; }

// Between tw_tiles_on and tw_tiles_off. piece: the number of the first row; lines: tw_bf16_lines of all rows, or 0.
static void tw_bf16_matmul(const uint16_t* a, int64_t stride, int64_t rows, const uint8_t* w, int64_t columns,
                           int64_t steps, float* out, int64_t out_stride, int64_t piece = 0, int64_t lines = 0) {
    const int64_t groups = tw_blocks(columns, 16);
    const uint8_t* const ahead = w + (groups * 1024 + piece / 32 * (groups / 2) * lines * 64) * steps;
    if (tw_has_tiles) return tw_amx_rows(a, stride, rows, w, groups, steps, out, out_stride, ahead, lines);
    for (int64_t r = 0; r < rows; r += 6) {
        int64_t g = 0;
        for (; g + 4 <= groups; g += 4)
            tw_bf16_tile<6, 4>(a, stride, r, rows, w + g * steps * tw_bf16_step_bytes, steps, out + 16 * g, out_stride);
        for (; g < groups; ++g)
            tw_bf16_tile<6, 1>(a, stride, r, rows, w + g * steps * tw_bf16_step_bytes, steps, out + 16 * g, out_stride);
    }
}
#else
static constexpr bool tw_has_bf16 = false, tw_has_tiles = false;
static constexpr int64_t tw_bf16_piece = 48;
static inline void tw_round_row(const float*, int64_t, int64_t, uint16_t*) {}
static inline void tw_round_row(const uint16_t*, int64_t, int64_t, uint16_t*) {}
static inline void tw_store_bf16(const float* a, int64_t count, uint16_t* to) {
    for (int64_t k = 0; k < count; ++k) to[k] = tw_to_bf16(a[k]);
}
static inline void tw_tiles_on() {}
static inline void tw_tiles_off() {}
template <class F> static inline const uint8_t* tw_bf16_weights(const uint8_t* base, int64_t, int64_t, uint8_t*) {
    return base;
}
template <class F> static inline void tw_bf16_ahead(const uint8_t*, int64_t, int64_t, int64_t, int64_t) {}
static inline int64_t tw_bf16_lines(int64_t) { return 0; }
static inline void tw_bf16_matmul(const uint16_t*, int64_t, int64_t, const uint8_t*, int64_t, int64_t, float*, int64_t,
                                  int64_t = 0, int64_t = 0) {}
#endif
