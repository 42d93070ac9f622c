// The scores of a block of 64 keys: sums over the features in ascending order, one lane per key, so that a score has the
// same bits in every way through this file.
//
// Few rows take the turned keys from registers. For more rows the keys are turned into the L1 cache, and four rows share
// each of them.

static constexpr int tw_keys = 64, tw_pass = 64;  // tw_pass: features per turn through the L1 cache
static constexpr int tw_tile_rows = tw_registers >= 32 ? 4 : 1;

#define TW_LANES_8(M, N, H) M(0, N, H), M(1, N, H), M(2, N, H), M(3, N, H), M(4, N, H), M(5, N, H), M(6, N, H), M(7, N, H)
#define TW_LANES_16(M, N, H) TW_LANES_8(M, N, H), M(8, N, H), M(9, N, H), M(10, N, H), M(11, N, H), M(12, N, H), \
    M(13, N, H), M(14, N, H), M(15, N, H)
#define TW_UPPER(l, N, H) ((l) & (H) ? (N) + (l) - (H) : (l))
#define TW_LOWER(l, N, H) ((l) & (H) ? (N) + (l) : (l) + (H))

// Vectors i and i + H exchange the blocks of H lanes off the diagonal: one stage of a transposition.
template <int H> static inline void tw_exchange(tw_v16& a, tw_v16& b) {
    const tw_v16 upper = __builtin_shufflevector(a, b, TW_LANES_16(TW_UPPER, 16, H));
    b = __builtin_shufflevector(a, b, TW_LANES_16(TW_LOWER, 16, H));
    a = upper;
}
template <int H> static inline void tw_exchange(tw_v8d& a, tw_v8d& b) {
    const tw_v8d upper = __builtin_shufflevector(a, b, TW_LANES_8(TW_UPPER, 8, H));
    b = __builtin_shufflevector(a, b, TW_LANES_8(TW_LOWER, 8, H));
    a = upper;
}
template <int H, int N, class V> static inline void tw_stage(V* x) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
        if (!(i & H)) tw_exchange<H>(x[i], x[i + H]);
}
static inline void tw_transpose(tw_v16* x) {
    tw_stage<8, 16>(x); tw_stage<4, 16>(x); tw_stage<2, 16>(x); tw_stage<1, 16>(x);
}
static inline void tw_transpose(tw_v8d* x) { tw_stage<4, 8>(x); tw_stage<2, 8>(x); tw_stage<1, 8>(x); }

// x[i]: feature i of 16 (8 in double) keys that lie `step` bytes apart, the first of these features of the first at `key`.
template <class F> static inline void tw_turn_square(const uint8_t* key, int64_t step, typename F::vector* x) {
#if defined(__AVX512DQ__) && !defined(__clang__)
    if constexpr (__is_same(F, tw_F32)) {
        // Quarters of four keys meet in a register on their way from memory: half of the stages need no shuffles.
        typedef float quarter __attribute__((vector_size(16)));
        typedef quarter quarter_any __attribute__((aligned(1), may_alias));
        const auto place = [](const uint8_t* p, tw_v16 y, uint16_t lanes) __attribute__((always_inline)) {
            return __builtin_ia32_broadcastf32x4_512(*(const quarter_any*)p, y, lanes);
        };
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i, key += step)
#pragma GCC unroll 4
            for (int at = 0; at < 4; ++at) {
                const uint8_t* const p = key + 16 * at;
                tw_v16 y = place(p, tw_v16{}, 0x000f);
                y = place(p + 4 * step, y, 0x00f0);
                y = place(p + 8 * step, y, 0x0f00);
                x[4 * at + i] = place(p + 12 * step, y, 0xf000);
            }
        tw_stage<2, 16>(x); tw_stage<1, 16>(x);
        return;
    }
#endif
#pragma GCC unroll 16
    for (int i = 0; i < F::block; ++i) F::unpack(key + i * step, x + i);
    tw_transpose(x);
}

// The same of keys [c, c + lanes) wherever they lie, from feature d on, with zeros from `end` on.
template <class F>
__attribute__((noinline)) static void tw_turn_apart(const void* const* keys, int64_t count, int64_t c, int64_t d,
                                                    int64_t end, typename F::vector* x) {
    constexpr int lanes = 64 / sizeof(typename F::real);
    for (int i = 0; i < lanes; ++i) {
        const uint8_t* const key = (const uint8_t*)keys[c + i < count ? c + i : count - 1];
        if (d + lanes <= end) F::unpack(key + d / lanes * F::bytes, x + i);
        else x[i] = tw_tail<F>(key, d, end);
    }
    tw_transpose(x);
}

// The keys of a block: one pointer each; `step` bytes from each to the next where that is always the same, else 0.
// `ahead`: so many bytes on lies the next block, key behind key, and is fetched into the L2 cache meanwhile; 0: nothing.
struct tw_key_list {
    const void* const* at;
    int64_t count, step, ahead;

    tw_key_list(const void* const* keys, int64_t number, int64_t next) : at(keys), count(number), step(0), ahead(next) {
        if (count < 2) return;
        const int64_t first = (const char*)at[1] - (const char*)at[0];
        int64_t other = 0;
        for (int64_t i = 1; i < count; ++i) other |= ((const char*)at[i] - (const char*)at[i - 1]) ^ first;
        if (!other) step = first;
    }
};

template <class F>
static inline void tw_turn(const tw_key_list& keys, int64_t c, int64_t d, int64_t end, typename F::vector* x) {
    constexpr int lanes = 64 / sizeof(typename F::real);
    static_assert(F::block == lanes, "keys are numbers, not blocks");
    if (!keys.step || c + lanes > keys.count || d + lanes > end) {
        typename F::vector apart[lanes];  // x itself stays in registers
        tw_turn_apart<F>(keys.at, keys.count, c, d, end, apart);
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) x[i] = apart[i];
        return;
    }
    const uint8_t* const first = (const uint8_t*)keys.at[c] + d / lanes * F::bytes;
    if (keys.ahead) {  // lines in their order: then the processor reads on by itself (1.1 times as fast as key by key)
        const uint8_t* const next = (const uint8_t*)keys.at[c] + d * F::bytes + keys.ahead;
#pragma GCC unroll 16
        for (int i = 0; i < lanes * F::bytes / 64; ++i) __builtin_prefetch(next + 64 * i, 0, 2);
    }
    tw_turn_square<F>(first, keys.step, x);
}

// Features [first, first + n) -> turned[feature][key]; n at most tw_pass.
template <class F>
__attribute__((noinline)) static void tw_turn_keys(const tw_key_list& keys, int64_t first, int64_t n,
                                                   typename F::real* turned) {
    constexpr int lanes = 64 / sizeof(typename F::real);
    for (int64_t c = 0; c < keys.count; c += lanes)
        for (int64_t d = 0; d < n; d += lanes) {
            typename F::vector x[lanes];
            tw_turn<F>(keys, c, first + d, first + n, x);
            for (int i = 0; i < lanes && d + i < n; ++i) tw_put(turned + (d + i) * tw_keys + c, x[i]);
        }
}

template <class F, int R>
__attribute__((noinline)) static void tw_score_few(const typename F::real* q, int64_t stride, const tw_key_list& keys,
                                                   int64_t features, typename F::real* scores) {
    typedef typename F::vector V;
    constexpr int lanes = 64 / sizeof(typename F::real);
    for (int64_t c = 0; c < keys.count; c += lanes)
        for (int64_t d = 0; d < features; d += lanes) {
            V x[lanes], sum[R];
            tw_turn<F>(keys, c, d, features, x);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sum[r] = d ? tw_load(scores + r * tw_keys + c) : V{};
            const auto add = [&](int i) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) sum[r] = tw_fma(q[r * stride + d + i] - V{}, x[i], sum[r]);
            };
            if (d + lanes <= features) {
#pragma GCC unroll 16
                for (int i = 0; i < lanes; ++i) add(i);
            } else {
                for (int i = 0; d + i < features; ++i) add(i);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) tw_put(scores + r * tw_keys + c, sum[r]);
        }
}

template <class T, int R>
__attribute__((noinline)) static void tw_score_tile(const T* q, int64_t stride, const T* turned, int64_t n, bool begin,
                                                    T* scores) {
    typedef decltype(tw_load(q)) V;
    constexpr int lanes = 64 / sizeof(T);
    for (int c = 0; c < tw_keys; c += 4 * lanes) {
        V sum[R][4];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sum[r][v] = begin ? V{} : tw_load(scores + r * tw_keys + c + v * lanes);
        for (int64_t d = 0; d < n; ++d) {
            V k[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) k[v] = tw_load(turned + d * tw_keys + c + v * lanes);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const V x = q[r * stride + d] - V{};
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v) sum[r][v] = tw_fma(x, k[v], sum[r][v]);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) tw_put(scores + r * tw_keys + c + v * lanes, sum[r][v]);
    }
}

// Row r sees the keys [from[r], to[r]) of the block.
struct tw_seen { int32_t from, to; };

// scores[r][key] = sum over d of q[r][d] * key[d], for every row that sees one of the keys.
template <class F>
static void tw_score_block(const typename F::real* q, int64_t stride, int64_t rows, const tw_seen* seen,
                           const tw_key_list& keys, int64_t features, typename F::real* turned,
                           typename F::real* scores) {
    typedef typename F::real T;
    constexpr int R = tw_tile_rows;
    bool wanted = false;
    for (int64_t r = 0; r < rows; ++r) wanted |= seen[r].from < seen[r].to;
    if (!wanted) return;
    if (features == 0)
        for (int64_t i = 0; i < rows * tw_keys; ++i) scores[i] = 0;
    if (rows == 1) return tw_score_few<F, 1>(q, stride, keys, features, scores);
    if (rows == 2) return tw_score_few<F, 2>(q, stride, keys, features, scores);
    if (rows == 3) return tw_score_few<F, 3>(q, stride, keys, features, scores);
    if (rows == 4) return tw_score_few<F, 4>(q, stride, keys, features, scores);
    for (int64_t first = 0; first < features; first += tw_pass) {
        const int64_t n = tw_least<int64_t>(tw_pass, features - first);
        tw_turn_keys<F>(keys, first, n, turned);
        for (int64_t r = 0; r < rows; r += R) {
            const int64_t left = tw_least<int64_t>(R, rows - r);
            bool any = false;
            for (int64_t i = 0; i < left; ++i) any |= seen[r + i].from < seen[r + i].to;
            if (!any) continue;
            const T* const a = q + r * stride + first;
            T* const out = scores + r * tw_keys;
            if (left == R) tw_score_tile<T, R>(a, stride, turned, n, !first, out);
            else if (left == 3) tw_score_tile<T, 3>(a, stride, turned, n, !first, out);
            else if (left == 2) tw_score_tile<T, 2>(a, stride, turned, n, !first, out);
            else tw_score_tile<T, 1>(a, stride, turned, n, !first, out);
        }
    }
}
