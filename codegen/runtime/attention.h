// Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022), split over the keys (flash decoding).
//
// Keys are numbered by position, and everything about a row happens at fixed positions: blocks of 64 keys, splits of
// 128 whose results are joined in ascending order, each score a sum over d ascending in one lane, each output a sum over
// the visible keys ascending. So a row has the same bits whatever rows share its tile, however the threads share the
// work, and wherever the keys lie (a key is a pointer). What a row does not see is never multiplied, not even by 0.
//
// Rows of a tile are queries times the query heads that read one key head; four of them share every loaded key and value.

static constexpr int tw_split = 128;
static constexpr int tw_most_units = 128;  // that splits are shared out of

#define TW_TURN(l, N, H) (((l) + (H)) % (N))

// All lanes joined by halving the distance, in every lane.
template <class J> static inline tw_v16 tw_across(tw_v16 x, J join) {
    x = join(x, __builtin_shufflevector(x, x, TW_LANES_16(TW_TURN, 16, 8)));
    x = join(x, __builtin_shufflevector(x, x, TW_LANES_16(TW_TURN, 16, 4)));
    x = join(x, __builtin_shufflevector(x, x, TW_LANES_16(TW_TURN, 16, 2)));
    return join(x, __builtin_shufflevector(x, x, TW_LANES_16(TW_TURN, 16, 1)));
}
template <class J> static inline tw_v8d tw_across(tw_v8d x, J join) {
    x = join(x, __builtin_shufflevector(x, x, TW_LANES_8(TW_TURN, 8, 4)));
    x = join(x, __builtin_shufflevector(x, x, TW_LANES_8(TW_TURN, 8, 2)));
    return join(x, __builtin_shufflevector(x, x, TW_LANES_8(TW_TURN, 8, 1)));
}

// exp(x) for x <= 0 as in scalar.h, but 0 below -87: a result that is no normal number costs a hundred instructions, and
// beside a weight of 1 it is nothing.
static inline tw_v16 tw_weight(tw_v16 x) {
    const tw_v16 clamped = x < -87.0f ? tw_splat(-87.0f) : x;
    const tw_v16 shifted = tw_fma(clamped, tw_splat(1.44269504088896341f), tw_splat(12582912.0f));
    const tw_v16 n = shifted - 12582912.0f;
    const tw_i16 power = (tw_i16)shifted - 0x4b400000;
    tw_v16 r = tw_fma(n, tw_splat(-0.693145751953125f), clamped);
    r = tw_fma(n, tw_splat(-1.42860682030941723212e-6f), r);
    tw_v16 p = tw_splat(1.9875691500e-4f);
    p = tw_fma(p, r, tw_splat(1.3981999507e-3f));
    p = tw_fma(p, r, tw_splat(8.3334519073e-3f));
    p = tw_fma(p, r, tw_splat(4.1665795894e-2f));
    p = tw_fma(p, r, tw_splat(1.6666665459e-1f));
    p = tw_fma(p, r, tw_splat(5.0000001201e-1f));
    p = tw_fma(p, r * r, r) + 1.0f;
    p *= (tw_v16)((power + 127) << 23);
    return x < -87.0f ? tw_v16{} : p;
}
static inline tw_v8d tw_weight(tw_v8d x) {
    tw_v8d y;
    for (int l = 0; l < 8; ++l) y[l] = x[l] < -700.0 ? 0.0 : tw_exp(x[l]);
    return y;
}
static inline float tw_weight(float x) { return tw_weight(tw_splat(x))[0]; }
static inline double tw_weight(double x) { return x < -700.0 ? 0.0 : tw_exp(x); }

// The lanes of each of four vectors joined by the tree of tw_across: lanes 4i to 4i + 3 of the result belong to x[i].
template <class J> static inline tw_v16 tw_across_four(const tw_v16* x, J join) {
    const tw_v16 first = join(TW_SHUFFLE(x[0], x[1], TW_LOW), TW_SHUFFLE(x[0], x[1], TW_HIGH));
    const tw_v16 second = join(TW_SHUFFLE(x[2], x[3], TW_LOW), TW_SHUFFLE(x[2], x[3], TW_HIGH));
    tw_v16 four = join(TW_SHUFFLE(first, second, TW_EVEN), TW_SHUFFLE(first, second, TW_ODD));
    four = join(four, TW_SHUFFLE(four, four, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return join(four, TW_SHUFFLE(four, four, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
}
// Number i of four in lanes 4i to 4i + 3.
static inline tw_v16 tw_quads(const float* p) {
    typedef float four __attribute__((vector_size(16)));
    typedef four four_any __attribute__((aligned(1), may_alias));
    const four x = *(const four_any*)p;
    return TW_SHUFFLE(x, x, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
}
static inline void tw_put_quads(float* p, tw_v16 x) { p[0] = x[0], p[1] = x[4], p[2] = x[8], p[3] = x[12]; }

// The scores of a row, times `scale`, with -inf for the keys that it does not see. `shown`: 0 for keys that nobody sees.
template <bool Whole, class T, class V>
static inline void tw_visible_scores(const T* scores, tw_seen seen, const T* shown, T scale, V* s) {
    typedef decltype(V{} < V{}) M;
    constexpr int lanes = 64 / sizeof(T), vectors = tw_keys / lanes;
    M place;
    for (int l = 0; l < lanes; ++l) place[l] = l;
    const V hidden = tw_limits<T>::low - V{};
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
        s[v] = tw_load(scores + v * lanes) * scale;
        if (Whole) continue;
        const M here = place + v * lanes;
        s[v] = (here >= seen.from) & (here < seen.to) & (tw_load(shown + v * lanes) != V{}) ? s[v] : hidden;
    }
}

// One row's scores of a block, times `scale` -> weights; its state is updated. The result: what its sums so far are
// multiplied by. Keys that the row does not see weigh 0 here, and are left out of the sums of values.
template <class T>
__attribute__((noinline)) static T tw_soften(T* scores, tw_seen seen, const T* shown, T scale, T& greatest, T& total) {
    typedef decltype(tw_load(scores)) V;
    constexpr int lanes = 64 / sizeof(T), vectors = tw_keys / lanes;
    const auto most = [](V a, V b) { return (a > b) | (a != a) ? a : b; };
    const auto plus = [](V a, V b) { return a + b; };
    V s[vectors];
    tw_visible_scores<false>(scores, seen, shown, scale, s);
    V top = s[0];
#pragma GCC unroll 8
    for (int v = 1; v < vectors; ++v) top = most(top, s[v]);
    const T new_max = tw_max(greatest, tw_across(top, most)[0]);
    if (new_max == tw_limits<T>::low) {  // nothing visible so far
        for (int v = 0; v < vectors; ++v) tw_put(scores + v * lanes, V{});
        return 1;
    }
    V sum = {};
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
        s[v] = tw_weight(s[v] - new_max);
        sum = v ? sum + s[v] : s[v];
        tw_put(scores + v * lanes, s[v]);
    }
    const T keep = tw_weight(greatest - new_max);
    total = total * keep + tw_across(sum, plus)[0];
    greatest = new_max;
    return keep;
}

// Four rows as tw_soften does it, with the same bits: what waits in one row is done for another one meanwhile.
template <bool Whole>
__attribute__((noinline)) static void tw_soften_four(float* scores, const tw_seen* seen, const float* shown, float scale,
                                                     float* greatest, float* total, float* keep) {
    constexpr int vectors = tw_keys / 16;
    const auto most = [](tw_v16 a, tw_v16 b) { return (a > b) | (a != a) ? a : b; };
    const auto plus = [](tw_v16 a, tw_v16 b) { return a + b; };
    tw_v16 s[4][vectors], top[4], sum[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        tw_visible_scores<Whole>(scores + r * tw_keys, seen[r], shown, scale, s[r]);
        top[r] = s[r][0];
#pragma GCC unroll 4
        for (int v = 1; v < vectors; ++v) top[r] = most(top[r], s[r][v]);
    }
    const tw_v16 before = tw_quads(greatest), found = tw_across_four(top, most);
    const tw_v16 new_max = most(before, found);
    float most_now[4];
    tw_put_quads(most_now, new_max);
    for (int r = 0; r < 4; ++r) {
        if (most_now[r] != tw_limits<float>::low) continue;
        for (int i = 0; i < 4; ++i)
            keep[i] = tw_soften<float>(scores + i * tw_keys, seen[i], shown, scale, greatest[i], total[i]);
        return;
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
        const tw_v16 top_of_row = tw_splat(most_now[r]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
            const tw_v16 weight = tw_weight(s[r][v] - top_of_row);
            sum[r] = v ? sum[r] + weight : weight;
            tw_put(scores + r * tw_keys + v * 16, weight);
        }
    }
    const tw_v16 factor = tw_weight(before - new_max);
    tw_put_quads(total, tw_quads(total) * factor + tw_across_four(sum, plus));
    tw_put_quads(greatest, new_max);
    tw_put_quads(keep, factor);
}

// All rows of a block: scores -> weights, and in `keep` what the sums of a row so far are multiplied by.
template <class T>
static void tw_soften_block(T* scores, int64_t rows, const tw_seen* seen, const T* shown, T scale, T* greatest, T* total,
                            T* keep) {
    int64_t hidden = 0;
    for (int k = 0; k < tw_keys; ++k) hidden += shown[k] == 0;
    const bool whole = !hidden;
    for (int64_t r = 0; r < rows;) {
        if constexpr (__is_same(T, float)) {
            bool every = r + 4 <= rows, all = whole;
            for (int64_t i = r; every && i < r + 4; ++i) {
                every &= seen[i].from < seen[i].to;
                all &= seen[i].from == 0 && seen[i].to == tw_keys;
            }
            if (every) {
                (all ? tw_soften_four<true> : tw_soften_four<false>)(scores + r * tw_keys, seen + r, shown, scale,
                                                                     greatest + r, total + r, keep + r);
                r += 4;
                continue;
            }
        }
        keep[r] = 1;
        if (seen[r].from < seen[r].to)
            keep[r] = tw_soften<T>(scores + r * tw_keys, seen[r], shown, scale, greatest[r], total[r]);
        ++r;
    }
}

template <class T> static inline void tw_scale_row(T* row, int64_t features, T factor) {
    if (factor == 1) return;
#pragma GCC ivdep
    for (int64_t f = 0; f < features; ++f) row[f] *= factor;
}

// out[r][f] += sum over keys [from, to) of weights[r][key] * values[key][f], for R rows and V vectors from feature f on.
template <class T, int R, int N>
static inline void tw_mix_tile(const T* weights, int64_t from, int64_t to, const T* const* values, int64_t f,
                               int64_t ahead, T* out, int64_t stride) {
    typedef decltype(tw_load(out)) V;
    constexpr int lanes = 64 / sizeof(T);
    V sum[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) sum[r][v] = tw_load(out + r * stride + f + v * lanes);
    for (int64_t j = from; j < to; ++j) {
        V x[N];
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) {
            x[v] = tw_load(values[j] + f + v * lanes);
            __builtin_prefetch((const char*)(values[j] + f + v * lanes) + ahead, 0, 2);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const V weight = weights[r * tw_keys + j] - V{};
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) sum[r][v] = tw_fma(weight, x[v], sum[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) tw_put(out + r * stride + f + v * lanes, sum[r][v]);
}

// One pass of features (at most tw_pass) of R rows.
template <class T, int R>
__attribute__((noinline)) static void tw_mix_pass(const T* weights, int64_t from, int64_t to, const T* const* values,
                                                  int64_t f, int64_t end, int64_t ahead, T* out, int64_t stride) {
    constexpr int lanes = 64 / sizeof(T);
    for (; f + 4 * lanes <= end; f += 4 * lanes) tw_mix_tile<T, R, 4>(weights, from, to, values, f, ahead, out, stride);
    for (; f + lanes <= end; f += lanes) tw_mix_tile<T, R, 1>(weights, from, to, values, f, ahead, out, stride);
    for (; f < end; ++f)
        for (int r = 0; r < R; ++r) {
            T sum = out[r * stride + f];
            for (int64_t j = from; j < to; ++j) sum = tw_fma(weights[r * tw_keys + j], values[j][f], sum);
            out[r * stride + f] = sum;
        }
}

template <class T>
static inline void tw_mix_rows(int64_t rows, const T* weights, int64_t from, int64_t to, const T* const* values,
                               int64_t f, int64_t end, int64_t ahead, T* out, int64_t stride) {
    if (from >= to) return;
    if (rows == tw_tile_rows) tw_mix_pass<T, tw_tile_rows>(weights, from, to, values, f, end, ahead, out, stride);
    else if (rows == 3) tw_mix_pass<T, 3>(weights, from, to, values, f, end, ahead, out, stride);
    else if (rows == 2) tw_mix_pass<T, 2>(weights, from, to, values, f, end, ahead, out, stride);
    else tw_mix_pass<T, 1>(weights, from, to, values, f, end, ahead, out, stride);
}

// out[r] += the values of the keys that row r sees, weighted. Rows go together as far as they see the same keys.
template <class T>
static void tw_mix_block(const T* weights, int64_t rows, const tw_seen* seen, const T* const* values, int64_t features,
                         int64_t ahead, T* out, int64_t stride) {
    bool wanted = false;
    for (int64_t r = 0; r < rows; ++r) wanted |= seen[r].from < seen[r].to;
    if (!wanted) return;
    for (int64_t f = 0; f < features; f += tw_pass) {
        const int64_t end = tw_least<int64_t>(f + tw_pass, features);
        for (int64_t r = 0; r < rows; r += tw_tile_rows) {
            const int64_t count = tw_least<int64_t>(tw_tile_rows, rows - r);
            int64_t from = 0, to = tw_keys;
            for (int64_t i = r; i < r + count; ++i) {
                from = tw_most<int64_t>(from, seen[i].from);
                to = tw_least<int64_t>(to, seen[i].to);
            }
            to = tw_most(from, to);
            for (int64_t i = r; i < r + count; ++i)
                tw_mix_rows<T>(1, weights + i * tw_keys, seen[i].from, tw_least<int64_t>(from, seen[i].to), values, f, end, 0,
                               out + i * stride, stride);
            tw_mix_rows<T>(count, weights + r * tw_keys, from, to, values, f, end, r ? 0 : ahead, out + r * stride,
                           stride);
            for (int64_t i = r; i < r + count; ++i)
                tw_mix_rows<T>(1, weights + i * tw_keys, tw_most<int64_t>(to, seen[i].from), seen[i].to, values, f, end, 0,
                               out + i * stride, stride);
        }
    }
}

// What a row's sums are multiplied by in the end; a row that saw nothing gives 0. The sink, a score whose value is 0, is
// joined here and nowhere else: its place does not depend on where the splits of a tile begin.
template <class T> static inline T tw_share_of_one(T total) { return total > 0 ? 1 / total : total; }
template <class T> static inline T tw_share_beside(T greatest, T total, T sink) {
    if (greatest == tw_limits<T>::low) return 0;
    const T top = tw_max(greatest, sink), keep = tw_weight(greatest - top);
    return keep / (total * keep + tw_weight(sink - top));
}

// A row's result over the next split joined to that over the splits before it.
template <class T>
__attribute__((noinline)) static void tw_join(T& greatest, T& total, T* out, T next_greatest, T next_total,
                                              const T* next, int64_t features) {
    if (next_greatest == tw_limits<T>::low) return;
    const bool empty = greatest == tw_limits<T>::low;
    const T top = tw_max(greatest, next_greatest);
    const T keep = tw_weight(greatest - top), add = tw_weight(next_greatest - top);
    total = empty ? next_total : total * keep + next_total * add;
    greatest = top;
#pragma GCC ivdep
    for (int64_t f = 0; f < features; ++f) out[f] = empty ? next[f] : tw_fma(next[f], add, out[f] * keep);
}

// Results of splits that several threads work on: states [units, rows, splits] of (out, greatest, total) behind the
// counters of the units. The first thread of a unit joins its own splits and hands in one result; the others hand in one
// per split. Whoever comes last joins them in the order of the splits.
template <class T> struct tw_splits {
    void* room;
    int64_t rows, splits, stride;

    T* state(int64_t unit, int64_t row, int64_t split) const {
        const int64_t number = (unit * rows + row) * splits + split;
        return (T*)((char*)room + 64 * tw_most_units) + number * (stride + 64 / (int64_t)sizeof(T));
    }
    void hand_in(int64_t unit, int64_t split, int64_t used, const T* greatest, const T* total, const T* out) const {
        for (int64_t r = 0; r < used; ++r) {
            T* const mine = state(unit, r, split);
            __builtin_memcpy(mine, out + r * stride, stride * sizeof(T));
            mine[stride] = greatest[r], mine[stride + 1] = total[r];
        }
    }
    // `own` of `count` splits are handed in, `first` of all by the first thread. True for whoever completes them: its state
    // is then that of the whole unit.
    bool finish(int64_t unit, int64_t own, int64_t first, int64_t count, int64_t used, T* greatest, T* total,
                T* out) const {
        int64_t* const counter = (int64_t*)room + 8 * unit;
        if (__atomic_add_fetch(counter, own, __ATOMIC_ACQ_REL) != count) return false;
        __atomic_store_n(counter, 0, __ATOMIC_RELAXED);
        for (int64_t r = 0; r < used; ++r) {
            const T* const begin = state(unit, r, 0);
            __builtin_memcpy(out + r * stride, begin, stride * sizeof(T));
            greatest[r] = begin[stride], total[r] = begin[stride + 1];
            for (int64_t s = tw_most<int64_t>(first, 1); s < count; ++s) {
                const T* const next = state(unit, r, s);
                tw_join<T>(greatest[r], total[r], out + r * stride, next[stride], next[stride + 1], next, stride);
            }
        }
        return true;
    }
};
