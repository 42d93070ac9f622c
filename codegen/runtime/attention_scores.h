// The scores of a block of 64 keys. A score has the same bits in every way through this file: features go in passes of 64,
// a pass is a sum for each lane of a vector (features l, 16 + l, ... ascending), these are joined by halves (l with l + 8,
// then l + 4, ...), and the passes are added in ascending order.
//
// Few rows read each key as it lies, once, along the features, and 15 shuffles join the lanes of 16 keys at once. (With
// keys turned in registers so that 16 of them lie across the lanes, one row took 1.15 times as long behind 4,096 keys.)
// For more rows the keys are turned into the L1 cache, where rows share each of them and nothing is shuffled.

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

// Features [first, first + n) -> turned[feature][key], zeros up to whole vectors of features; n at most tw_pass.
template <class F>
__attribute__((noinline)) static void tw_turn_keys(const tw_key_list& keys, int64_t first, int64_t n,
                                                   typename F::real* turned) {
    constexpr int lanes = 64 / sizeof(typename F::real);
    for (int64_t c = 0; c < keys.count; c += lanes)
        for (int64_t d = 0; d < n; d += lanes) {
            typename F::vector x[lanes];
            tw_turn<F>(keys, c, first + d, first + n, x);
            for (int i = 0; i < lanes; ++i) tw_put(turned + (d + i) * tw_keys + c, x[i]);
        }
}

#define TW_OWN(l, N, H) ((l) & (H) ? (N) + (l) : (l))
#define TW_OTHER(l, N, H) ((l) & (H) ? (N) + (l) - (H) : (l) + (H))

// Lanes l and l + H of `a` joined in the lanes without bit H, those of `b` in the lanes with it.
template <int H> static inline tw_v16 tw_meet(tw_v16 a, tw_v16 b) {
    return __builtin_shufflevector(a, b, TW_LANES_16(TW_OWN, 16, H)) +
           __builtin_shufflevector(a, b, TW_LANES_16(TW_OTHER, 16, H));
}
template <int H> static inline tw_v8d tw_meet(tw_v8d a, tw_v8d b) {
    return __builtin_shufflevector(a, b, TW_LANES_8(TW_OWN, 8, H)) +
           __builtin_shufflevector(a, b, TW_LANES_8(TW_OTHER, 8, H));
}
// Lane i of the result: the lanes of x[i] joined.
template <int N, class V> static inline V tw_meet_all(V* x) {
    if constexpr (N == 1) return x[0];
    else {
#pragma GCC unroll 8
        for (int i = 0; i < N / 2; ++i) x[i] = tw_meet<N / 2>(x[i], x[i + N / 2]);
        return tw_meet_all<N / 2>(x);
    }
}

// The lanes of a pass of one row: n features of the key.
template <class F>
__attribute__((noinline)) static typename F::vector tw_part_dot(const typename F::real* q, const uint8_t* key, int64_t n) {
    constexpr int lanes = 64 / sizeof(typename F::real);
    typename F::vector sum = {}, k;
    int64_t d = 0;
    for (; d + lanes <= n; d += lanes) {
        F::unpack(key + d / lanes * F::bytes, &k);
        sum = tw_fma(tw_load(q + d), k, sum);
    }
    return d < n ? tw_fma(tw_load(q + d), tw_tail<F>(key, d, n), sum) : sum;
}
template <class F> static inline typename F::vector tw_whole_dot(const typename F::real* q, const uint8_t* key) {
    constexpr int lanes = 64 / sizeof(typename F::real);
    typename F::vector sum = {}, k;
#pragma GCC unroll 8
    for (int d = 0; d < tw_pass; d += lanes) {
        F::unpack(key + d / lanes * F::bytes, &k);
        sum = tw_fma(tw_load(q + d), k, sum);
    }
    return sum;
}

// A pass of R rows against 16 (8 in double) keys.
template <class F, int R, bool Whole>
static inline void tw_score_dots(const typename F::real* q, int64_t stride, const void* const* keys, int64_t first,
                                 int64_t n, typename F::real* scores) {
    constexpr int lanes = 64 / sizeof(typename F::real);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const auto* const own = q + r * stride + first;
        const int64_t skipped = first / lanes * F::bytes;
        typename F::vector x[lanes];
        if constexpr (Whole) {
#pragma GCC unroll 16
            for (int i = 0; i < lanes; ++i) x[i] = tw_whole_dot<F>(own, (const uint8_t*)keys[i] + skipped);
        } else {
            for (int i = 0; i < lanes; ++i) x[i] = tw_part_dot<F>(own, (const uint8_t*)keys[i] + skipped, n);
        }
        const auto found = tw_meet_all<lanes>(x);
        tw_put(scores + r * tw_keys, first ? tw_load(scores + r * tw_keys) + found : found);
    }
}

template <class F, int R>
__attribute__((noinline)) static void tw_score_few(const typename F::real* q, int64_t stride, const tw_key_list& keys,
                                                   int64_t features, typename F::real* scores) {
    static_assert(F::block == 64 / sizeof(typename F::real), "keys are numbers, not blocks");
    constexpr int lanes = F::block;
    for (int64_t c = 0; c < keys.count; c += lanes) {
        const void* at[lanes];
        for (int i = 0; i < lanes; ++i) at[i] = keys.at[tw_least<int64_t>(c + i, keys.count - 1)];
        const void* const* const own = c + lanes <= keys.count ? keys.at + c : at;
        for (int64_t first = 0; first < features; first += tw_pass) {
            const int64_t n = tw_least<int64_t>(tw_pass, features - first);
            const char* const next = (const char*)own[0] + first * F::bytes + keys.ahead;
            if (keys.ahead)  // lines in their order: then the processor reads on by itself
                for (int64_t i = 0; i < n * F::bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
            if (n == tw_pass) tw_score_dots<F, R, true>(q, stride, own, first, n, scores + c);
            else tw_score_dots<F, R, false>(q, stride, own, first, n, scores + c);
        }
    }
}

template <class F>
static inline void tw_score_up_to_four(const typename F::real* q, int64_t stride, int64_t rows, const tw_key_list& keys,
                                       int64_t features, typename F::real* scores) {
    if constexpr (tw_tile_rows == 1) {  // few registers: one by one
        for (int64_t r = 0; r < rows; ++r)
            tw_score_few<F, 1>(q + r * stride, stride, keys, features, scores + r * tw_keys);
    } else {
        if (rows == 1) tw_score_few<F, 1>(q, stride, keys, features, scores);
        else if (rows == 2) tw_score_few<F, 2>(q, stride, keys, features, scores);
        else if (rows == 3) tw_score_few<F, 3>(q, stride, keys, features, scores);
        else tw_score_few<F, 4>(q, stride, keys, features, scores);
    }
}

// Lanes l, l + H, l + 2 * H, ... of a pass joined for R rows and N vectors of turned keys.
template <int H, class T, int R, int N, class V>
static inline __attribute__((always_inline)) void tw_join_turned(const T* q, int64_t stride, const T* turned, int64_t n,
                                                                 int64_t l, V (&sum)[R][N]) {
    constexpr int lanes = 64 / sizeof(T);
    if constexpr (H == lanes) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) sum[r][v] = V{};
        for (int64_t d = l; d < n; d += lanes) {
            V k[N];
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) k[v] = tw_load(turned + d * tw_keys + v * lanes);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const V x = q[r * stride + d] - V{};
#pragma GCC unroll 4
                for (int v = 0; v < N; ++v) sum[r][v] = tw_fma(x, k[v], sum[r][v]);
            }
        }
    } else {
        V other[R][N];
        tw_join_turned<2 * H, T, R, N>(q, stride, turned, n, l, sum);
        tw_join_turned<2 * H, T, R, N>(q, stride, turned, n, l + H, other);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) sum[r][v] = sum[r][v] + other[r][v];
    }
}

// n: features of the pass, up to whole vectors.
template <class T, int R>
__attribute__((noinline)) static void tw_score_rows(const T* q, int64_t stride, const T* turned, int64_t n, bool begin,
                                                    T* scores) {
    typedef decltype(tw_load(q)) V;
    constexpr int lanes = 64 / sizeof(T);
    for (int c = 0; c < tw_keys; c += 2 * lanes) {
        V sum[R][2];
        tw_join_turned<1, T, R, 2>(q, stride, turned + c, n, 0, sum);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < 2; ++v) {
                T* const at = scores + r * tw_keys + c + v * lanes;
                tw_put(at, begin ? sum[r][v] : tw_load(at) + sum[r][v]);
            }
    }
}

template <class T>
static inline void tw_score_tile(const T* q, int64_t stride, const T* turned, int64_t n, bool begin, int64_t rows,
                                 T* scores) {
    for (int64_t r = 0; r < rows; r += 2, q += 2 * stride, scores += 2 * tw_keys) {
        if (r + 1 == rows) tw_score_rows<T, 1>(q, stride, turned, n, begin, scores);
        else tw_score_rows<T, 2>(q, stride, turned, n, begin, scores);
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
    if (rows <= 4) return tw_score_up_to_four<F>(q, stride, rows, keys, features, scores);
    for (int64_t first = 0; first < features; first += tw_pass) {
        const int64_t n = tw_least<int64_t>(tw_pass, features - first);
        const int64_t padded = tw_blocks(n, F::block) * F::block;
        tw_turn_keys<F>(keys, first, n, turned);
        for (int64_t r = 0; r < rows; r += R) {
            const int64_t left = tw_least<int64_t>(R, rows - r);
            bool any = false;
            for (int64_t i = 0; i < left; ++i) any |= seen[r + i].from < seen[r + i].to;
            if (!any) continue;
            const T* const a = q + r * stride + first;
            T* const out = scores + r * tw_keys;
            tw_score_tile<T>(a, stride, turned, padded, !first, left, out);
        }
    }
}
