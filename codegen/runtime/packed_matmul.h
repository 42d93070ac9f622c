// Inner products of rows with packed weights: out[r][c] = sum over k of a[r][k] * w[c][k].
//
// The order of a sum is the same for any number of rows: within a run of columns that share a scale k ascends in one
// chain of fma, s; then total = d * s + (m * (sum of a in the run) + total). So a row has the same bits in every call.
//   a [rows, stride], zeros up to whole runs of 32    a_sums [rows, stride / 32], for formats with an offset
//   w groups of 16 columns    out [rows, out_stride], whole groups

#if defined(__AVX512F__)
static constexpr int tw_direct_rows = 8;
#else
static constexpr int tw_direct_rows = 2;
#endif

// sum + *a * w in every lane. The number is an operand of the instruction: left alone, gcc loads many of them ahead of
// their use and spills the sums.
static inline tw_v16 tw_fma_at(const float* a, tw_v16 w, tw_v16 sum) {
#if defined(__AVX512F__)
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*a));
    return sum;
#else
    return tw_fma(tw_splat(*a), w, sum);
#endif
}

// *a in every lane, loaded where it is used, for the same reason.
static inline tw_v16 tw_splat_at(const float* a) {
#if defined(__AVX512F__)
    tw_v16 x;
    asm("vbroadcastss %1, %0" : "=v"(x) : "m"(*a));
    return x;
#else
    return tw_splat(*a);
#endif
}

// The sums of every 32 columns of a row, four at a time; the tree of each is that of tw_sum_lanes.
static inline void tw_sum_runs(const float* a, int64_t stride, float* sums) {
    const int64_t runs = stride / 32;
    for (int64_t s = 0; s < runs; s += 4) {
        tw_v16 x[4];
        float four[4];
        for (int64_t i = 0; i < 4; ++i)
            x[i] = s + i < runs ? tw_load(a + 32 * (s + i)) + tw_load(a + 32 * (s + i) + 16) : tw_v16{};
        tw_sum_lanes<4>(x, four);
        for (int64_t i = 0; i < 4 && s + i < runs; ++i) sums[s + i] = four[i];
    }
}

template <class F> static inline tw_v16 tw_add_run(tw_v16 s, tw_v16 d, tw_v16 m, float sum_of_a, tw_v16 total) {
    if (!F::scaled) return total + s;
    if (F::offset) total = tw_fma(m, tw_splat(sum_of_a), total);
    return tw_fma(d, s, total);
}

// M rows against G groups, straight from the packed bytes: M of 1 to 8. Rows beyond `rows` repeat the last one.
template <class F, int M, int G>
static inline void tw_packed_few(const float* a, int64_t stride, int64_t rows, const float* a_sums, const uint8_t* base,
                                 int64_t group_bytes, int64_t steps, float* out, int64_t out_stride) {
    const float* ar[M];
    for (int r = 0; r < M; ++r) ar[r] = a + (r < rows ? r : rows - 1) * stride;
    tw_v16 total[M][G];
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) total[r][g] = tw_v16{};
    const uint8_t* const codes = base + tw_lines(F::scale_bytes(steps));
    constexpr int runs = 32 / F::run, quads = F::run / 4;
    constexpr bool share = M >= 8;  // every number of a row is loaded once for all groups
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g)
            for (int line = 0; line < F::code_bytes; line += 64)
                __builtin_prefetch(codes + g * group_bytes + step * F::code_bytes + line + G * group_bytes);
#pragma GCC unroll 2
        for (int run = 0; run < runs; ++run) {
            tw_v16 s[M][G];
#pragma GCC unroll 8
            for (int r = 0; r < M; ++r)
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) s[r][g] = tw_v16{};
#pragma GCC unroll 8
            for (int q = 0; q < quads; ++q) {
                const int j = run * quads + q;
                tw_v16 w[G][4];
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) {
                    F::unpack(codes + g * group_bytes + step * F::code_bytes, j, w[g]);
#pragma GCC unroll 4
                    for (int b = 0; b < 4; ++b)
#pragma GCC unroll 2
                        for (int r = 0; r < M && !share; ++r) s[r][g] = tw_fma_at(ar[r] + 32 * step + 4 * j + b, w[g][b], s[r][g]);
                }
#pragma GCC unroll 4
                for (int b = 0; b < 4; ++b)
#pragma GCC unroll 8
                    for (int r = 0; r < M && share; ++r) {
                        const tw_v16 x = tw_splat_at(ar[r] + 32 * step + 4 * j + b);
#pragma GCC unroll 4
                        for (int g = 0; g < G; ++g) s[r][g] = tw_fma(x, w[g][b], s[r][g]);
                    }
            }
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) {
                tw_v16 d, m;
                tw_centered_factors<F>(base + g * group_bytes, runs * step + run, d, m);
#pragma GCC unroll 8
                for (int r = 0; r < M; ++r) {
                    const float sum = F::offset ? a_sums[(r < rows ? r : rows - 1) * (stride / 32) + step] : 0.0f;
                    total[r][g] = tw_add_run<F>(s[r][g], d, m, sum, total[r][g]);
                }
            }
        }
    }
    for (int r = 0; r < M && r < rows; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) tw_put(out + r * out_stride + 16 * g, total[r][g]);
}

// One run of up to 32 columns, unpacked: R rows against G groups, added to the totals in `out`.
template <class F, int R, int G>
static inline void tw_packed_run(const float* a, int64_t stride, int64_t rows, const float* a_sums, const float* w,
                                 const tw_v16* d, const tw_v16* m, float* out, int64_t out_stride) {
    const float* ar[R];
    for (int r = 0; r < R; ++r) ar[r] = a + (r < rows ? r : rows - 1) * stride;
    tw_v16 s[R][G];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) s[r][g] = tw_v16{};
#pragma GCC unroll 2
    for (int k = 0; k < F::run; ++k) {
        tw_v16 wk[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) wk[g] = tw_load(w + (g * 32 + k) * 16);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const tw_v16 x = tw_splat(ar[r][k]);
#pragma GCC unroll 4
            for (int g = 0; g < G; ++g) s[r][g] = tw_fma(x, wk[g], s[r][g]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        if (r >= rows) break;
        const float sum = F::offset ? a_sums[r * (stride / 32)] : 0.0f;
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            float* const place = out + r * out_stride + 16 * g;
            tw_put(place, tw_add_run<F>(s[r][g], d[g], m[g], sum, tw_load(place)));
        }
    }
}

template <class F> __attribute__((noinline)) static void tw_unpack_step(const uint8_t* codes, float* w) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
        tw_v16 four[4];
        F::unpack(codes, j, four);
        for (int b = 0; b < 4; ++b) tw_put(w + (4 * j + b) * 16, four[b]);
    }
}

// Many rows against G groups: every run is unpacked once, into the L1 cache, for all rows.
template <class F, int R, int G>
__attribute__((noinline)) static void tw_packed_many(const float* a, int64_t stride, int64_t rows, const float* a_sums,
                                                     const uint8_t* base, int64_t group_bytes, int64_t steps, float* out,
                                                     int64_t out_stride) {
    alignas(64) float w[G * 32 * 16];
    const uint8_t* const codes = base + tw_lines(F::scale_bytes(steps));
    constexpr int runs = 32 / F::run;
    for (int64_t r = 0; r < rows; ++r)
        for (int g = 0; g < G; ++g) tw_put(out + r * out_stride + 16 * g, tw_v16{});
    for (int64_t step = 0; step < steps; ++step) {
        for (int g = 0; g < G; ++g) tw_unpack_step<F>(codes + g * group_bytes + step * F::code_bytes, w + g * 32 * 16);
        for (int run = 0; run < runs; ++run) {
            tw_v16 d[G], m[G];
            for (int g = 0; g < G; ++g) tw_centered_factors<F>(base + g * group_bytes, runs * step + run, d[g], m[g]);
            for (int64_t r = 0; r < rows; r += R)
                tw_packed_run<F, R, G>(a + r * stride + 32 * step + run * F::run, stride, rows - r,
                                       a_sums + r * (stride / 32) + step, w + run * F::run * 16, d, m,
                                       out + r * out_stride, out_stride);
        }
    }
}

// Where rows begin: three pointers reach nine rows, and the compiler need not keep one for each.
struct tw_even_rows {
    const float *a, *third, *sixth;
    int64_t stride;
    tw_even_rows(const float* a, int64_t stride, int64_t) : a(a), third(a + 3 * stride), sixth(a + 6 * stride), stride(stride) {}
    const float* row(int r) const { return r < 3 ? a + r * stride : r < 6 ? third + (r - 3) * stride : sixth + (r - 6) * stride; }
};
// Rows beyond the last one repeat it.
template <int R> struct tw_last_rows {
    const float* at[R];
    tw_last_rows(const float* a, int64_t stride, int64_t rows) {
        for (int r = 0; r < R; ++r) at[r] = a + (r < rows ? r : rows - 1) * stride;
    }
    const float* row(int r) const { return at[r]; }
};

// R rows against G groups of plain numbers, one step of 32 columns read where it lies, added to the totals in `out`.
template <class F, int R, int G, class Rows>
static inline void tw_dense_step(const float* a, int64_t stride, int64_t rows, const uint8_t* codes, int64_t group_bytes,
                                 float* out, int64_t out_stride) {
    static_assert(R <= 9, "tw_even_rows");
    const Rows of(a, stride, rows);
    tw_v16 s[R][G];
#pragma GCC unroll 9
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) s[r][g] = tw_v16{};
#pragma GCC unroll 1
    for (int j = 0; j < 8; ++j) {
        tw_v16 w[G][4];
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) F::unpack(codes + g * group_bytes, j, w[g]);
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b)
#pragma GCC unroll 9
            for (int r = 0; r < R; ++r) {
                const tw_v16 x = tw_splat(of.row(r)[4 * j + b]);
#pragma GCC unroll 4
                for (int g = 0; g < G; ++g) s[r][g] = tw_fma(x, w[g][b], s[r][g]);
            }
    }
#pragma GCC unroll 9
    for (int r = 0; r < R; ++r) {
        if (r >= rows) break;
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            float* const place = out + r * out_stride + 16 * g;
            tw_put(place, tw_load(place) + s[r][g]);
        }
    }
}

// Many rows against G groups of plain numbers. Tiles of 6 x 4, 4 x 4, 8 x 3 and 12 x 2 are not faster than 8 x 2 (one
// core with AVX-512, weights of MiniLM), which divides 16 rows and blocks of 64 columns.
template <class F, int R, int G>
__attribute__((noinline)) static void tw_dense_many(const float* a, int64_t stride, int64_t rows, const uint8_t* codes,
                                                    int64_t group_bytes, int64_t steps, float* out, int64_t out_stride) {
    for (int64_t r = 0; r < rows; ++r)
        for (int g = 0; g < G; ++g) tw_put(out + r * out_stride + 16 * g, tw_v16{});
    for (int64_t step = 0; step < steps; ++step) {
        const uint8_t* const own = codes + step * F::code_bytes;
        int64_t r = 0;
        for (; r + R <= rows; r += R)
            tw_dense_step<F, R, G, tw_even_rows>(a + r * stride + 32 * step, stride, R, own, group_bytes,
                                                 out + r * out_stride, out_stride);
        if (r < rows)
            tw_dense_step<F, R, G, tw_last_rows<R>>(a + r * stride + 32 * step, stride, rows - r, own, group_bytes,
                                                    out + r * out_stride, out_stride);
    }
}

template <class F, int R, int G>
static inline void tw_many(const float* a, int64_t stride, int64_t rows, const float* a_sums, const uint8_t* base,
                           int64_t group_bytes, int64_t steps, float* out, int64_t out_stride) {
    if constexpr (F::scaled) tw_packed_many<F, R, G>(a, stride, rows, a_sums, base, group_bytes, steps, out, out_stride);
    else tw_dense_many<F, R, G>(a, stride, rows, base, group_bytes, steps, out, out_stride);
}

// All columns of a block: `base` is its first group, `columns` may end inside the last one. Every tile here is a good
// part of a second of compilation, so there are few of them.
template <class F>
__attribute__((noinline)) static void tw_packed_matmul(const float* a, int64_t stride, int64_t rows, const float* a_sums,
                                                       const uint8_t* base, int64_t columns, int64_t steps, float* out,
                                                       int64_t out_stride) {
#if defined(__AVX512F__)
    constexpr int R = F::scaled ? 6 : 8, G = F::scaled ? 4 : 2, R1 = 8;
#else
    constexpr int R = 3, G = 2, R1 = 4;
#endif
    const int64_t group_bytes = tw_group_bytes<F>(steps), groups = tw_blocks(columns, 16);
    for (int64_t g = 0; g < groups;) {
        const uint8_t* const w = base + g * group_bytes;
        float* const to = out + 16 * g;
        const bool few = rows <= tw_direct_rows && g + 2 <= groups;
#define TW_FEW(M, G) tw_packed_few<F, M, G>(a, stride, rows, a_sums, w, group_bytes, steps, to, out_stride), g += G
        if (few && rows == 1) TW_FEW(1, 2);  // of 4 groups at once the prefetched lines do not fit the L1 cache
        else if (few && rows == 2) TW_FEW(2, 2);
#if defined(__AVX512F__)
        else if (few && rows <= 4) TW_FEW(4, 2);
        else if (few) TW_FEW(8, 2);
#endif
#undef TW_FEW
        else if (g + G <= groups) {
            tw_many<F, R, G>(a, stride, rows, a_sums, w, group_bytes, steps, to, out_stride);
            g += G;
        } else {
            tw_many<F, R1, 1>(a, stride, rows, a_sums, w, group_bytes, steps, to, out_stride);
            g += 1;
        }
    }
}
