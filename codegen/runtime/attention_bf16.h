// Attention of many rows in bfloat16 with AMX tiles, sums in float. For more than 16 queries with precision="bf16" or
// "int8"; depth a multiple of 32, features a multiple of 16.
//
// Everything is turned: a tile has 32 queries of one head in its columns, so that a vector holds 16 queries. Greatest
// scores and sums over the keys then need no shuffles, and weights go into the second product as they are made:
//   scores [64 keys, 32 queries] = keys x queries^T       sums [features, 32 queries] += values^T x weights
//
// Keys and values of a key head are rounded once per thread, and stay for all its tiles. Blocks of 64 keys lie at fixed
// positions, and a row's sums run over them in ascending order, so a row's bits do not depend on the other rows. Blocks
// that nobody sees are left out; a key that a row does not see weighs 0 in it.
//   queries [32 / 16][depth / 32] tiles: line p holds features 2p, 2p + 1 of 16 queries
//   a block [line: are the values finite?][64 / 16][depth / 32] tiles of 16 keys by 32 features,
//           [features / 16][2] tiles of 16 features by 32 keys; features up to whole 32

static constexpr int tw_lanes = 32;  // queries of a tile

// The memory of a thread: the blocks [from, to) of key head `owner` lie there, each at its number modulo `capacity`.
struct tw_tile_room {
    uint8_t* blocks;
    int64_t capacity, owner, from, to;
    uint8_t *queries, *weights;
    float *scores, *sums;
};
// One tile: `count` queries, row r of which sees the keys [visible_from[r], visible_to[r]), all of them in [first_key,
// last_key). owner: the number of its key head. end_key: behind the last key that any query of this head sees. factor:
// what scores are multiplied by to be exponents of 2.
struct tw_query_tile {
    const float* q;
    int64_t q_stride, count;
    const int64_t *visible_from, *visible_to;
    int64_t first_key, last_key, end_key, owner, depth, features;
    float factor;
};

// What the queries of a tile see of a block: keys [from, to) of it, 16 queries in a vector. `shown` is 0 for keys that
// nobody sees. begin, end: whole 32 keys around all that is seen.
struct tw_tile_view {
    alignas(64) int32_t from[tw_lanes], to[tw_lanes];
    alignas(64) float shown[tw_keys];
    int64_t begin, end;
    bool whole;

    void look(const tw_query_tile& tile, int64_t lanes, int64_t key) {
        int64_t least = tw_keys, most = 0;
        for (int64_t r = 0; r < lanes; ++r) {
            const int64_t row = tw_least(r, tile.count - 1);
            from[r] = (int32_t)tw_least<int64_t>(tw_most<int64_t>(tile.visible_from[row] - key, 0), tw_keys);
            to[r] = (int32_t)tw_most<int64_t>(tw_least<int64_t>(tile.visible_to[row] - key, tw_keys), 0);
            if (from[r] >= to[r]) from[r] = to[r] = 0;
            else least = tw_least<int64_t>(least, from[r]), most = tw_most<int64_t>(most, to[r]);
        }
        begin = least / 32 * 32, end = (most + 31) / 32 * 32;
    }
    // -inf for what is not seen.
    void hide(float* scores, int64_t lanes) const {
        const tw_v16 hidden = tw_limits<float>::low - tw_v16{};
        for (int64_t g = 0; g < lanes; g += 16) {
            const tw_i16 first = *(const tw_i16*)(from + g), last = *(const tw_i16*)(to + g);
            for (int64_t key = begin; key < end; ++key) {
                float* const at = scores + key * tw_lanes + g;
                const tw_i16 here = tw_splat_int((int32_t)key);
                const tw_i16 seen = shown[key] != 0 ? (here >= first) & (here < last) : tw_i16{};
                tw_put(at, seen ? tw_load(at) : hidden);
            }
        }
    }
};

// A mask in rows of 64 keys [rows, 64], added to the scores; -inf stays -inf.
static inline void tw_add_rows(float* scores, const tw_tile_view& view, const float* mask, int64_t rows) {
    const tw_v16 hidden = tw_limits<float>::low - tw_v16{};
    for (int64_t g = 0; g < rows; g += 16)
        for (int64_t key = view.begin; key < view.end; key += 16) {
            tw_v16 x[16];
            for (int i = 0; i < 16; ++i) x[i] = g + i < rows ? tw_load(mask + (g + i) * tw_keys + key) : tw_v16{};
            tw_transpose(x);
            for (int i = 0; i < 16; ++i) {
                float* const at = scores + (key + i) * tw_lanes + g;
                tw_put(at, x[i] == hidden ? hidden : tw_load(at) + x[i]);
            }
        }
}

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && !defined(__clang__)
static inline bool tw_has_tiled_attention() { return tw_has_tiles; }

// 2^x, off by 2^-18 of it, and exact for whole x; 0 for -inf.
static inline tw_v16 tw_power_of_two(tw_v16 x) {
    const tw_v16 r = __builtin_ia32_reduceps512_mask(x, 1, tw_v16{}, tw_every);  // x - floor(x)
    tw_v16 p = tw_splat(1.342669e-2f);
    p = tw_fma(p, r, tw_splat(5.224247e-2f));
    p = tw_fma(p, r, tw_splat(2.4128021e-1f));
    p = tw_fma(p, r, tw_splat(6.9304484e-1f));
    p = tw_fma(p, r, tw_splat(1.0f));
    return __builtin_ia32_scalefps512_mask(p, x, tw_v16{}, tw_every, 4);  // p * 2^floor(x)
}
// Two vectors as 16 pairs of bfloat16, a tie upwards: 0.7 cycles less for a vector of weights than tw_pairs.
static inline tw_u16x32 tw_quick_pairs(tw_v16 first, tw_v16 second) {
    const tw_i16 low = (tw_i16)((tw_u32x16)((tw_i16)first + 0x8000) >> 16), high = (tw_i16)second + 0x8000;
    return (tw_u16x32)((high & (int32_t)0xffff0000) | low);
}

// 16 rows of 32 numbers -> a tile whose line p holds numbers 2p, 2p + 1 of each row.
static inline void tw_turn_tile(tw_v16* pairs, uint8_t* to) {
    tw_transpose(pairs);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) tw_put((float*)(to + 64 * i), pairs[i]);
}

__attribute__((noinline)) static void tw_tile_queries(const float* q, int64_t stride, int64_t count, int64_t depth,
                                                      uint8_t* to) {
    for (int64_t first = 0; first < count; first += 16)
        for (int64_t d = 0; d < depth; d += 32, to += tw_bf16_step_bytes) {
            tw_v16 x[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const float* const row = q + (first + i) * stride + d;
                x[i] = first + i < count ? (tw_v16)tw_halves(tw_load(row), tw_load(row + 16)) : tw_v16{};
            }
            tw_turn_tile(x, to);
        }
}

template <class F>
__attribute__((noinline)) static void tw_tile_keys(const void* const* keys, int64_t count, int64_t depth, uint8_t* to) {
    const int64_t steps = depth / 32;
    for (int64_t key = 0; key < tw_keys; ++key)
        for (int64_t step = 0; step < steps; ++step) {
            tw_v16 x[2] = {};
            if (key < count)
                for (int half = 0; half < 2; ++half)
                    F::unpack((const uint8_t*)keys[key] + (2 * step + half) * F::bytes, x + half);
            uint8_t* const line = to + (key / 16 * steps + step) * tw_bf16_step_bytes + key % 16 * 64;
            *(tw_u16x32_any*)line = tw_halves(x[0], x[1]);
        }
}

// Whether all of them are finite.
__attribute__((noinline)) static bool tw_tile_values(const float* const* values, int64_t count, int64_t features,
                                                     uint8_t* to) {
    tw_v16 none = {};  // becomes NaN
    for (int64_t f = 0; f < features; f += 16)
        for (int64_t key = 0; key < tw_keys; key += 32, to += tw_bf16_step_bytes) {
            tw_v16 x[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const int64_t at = key + 2 * i;
                const tw_v16 first = at < count ? tw_load(values[at] + f) : tw_v16{};
                const tw_v16 second = at + 1 < count ? tw_load(values[at + 1] + f) : tw_v16{};
                none = tw_fma(first + first, tw_v16{}, tw_fma(second + second, tw_v16{}, none));
                x[i] = (tw_v16)tw_pairs(first, second);
            }
            tw_turn_tile(x, to);
        }
    if (features % 32) __builtin_memset(to, 0, 2 * tw_bf16_step_bytes);
    for (int l = 0; l < 16; ++l)
        if (none[l] != 0) return false;
    return true;
}

// out [32 rows, 16 * G of tw_lanes columns], added to if Add; a: two rows of tiles `next` apart; b: G rows of tiles.
template <bool Add, int G>
static inline void tw_tile_product(const uint8_t* a, int64_t a_next, const uint8_t* b, int64_t b_next, int64_t steps,
                                   float* out) {
    const int64_t line = 64, out_line = 4 * tw_lanes;
    float* const below = out + 16 * tw_lanes;
    if (Add) {
        asm volatile("tileloadd (%0,%1,1), %%tmm0" ::"r"(out), "r"(out_line) : "memory");
        asm volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(below), "r"(out_line) : "memory");
        if (G == 2) asm volatile("tileloadd (%0,%1,1), %%tmm1" ::"r"(out + 16), "r"(out_line) : "memory");
        if (G == 2) asm volatile("tileloadd (%0,%1,1), %%tmm3" ::"r"(below + 16), "r"(out_line) : "memory");
    } else {
        asm volatile("tilezero %%tmm0\n\ttilezero %%tmm1\n\ttilezero %%tmm2\n\ttilezero %%tmm3" ::: "memory");
    }
    for (int64_t step = 0; step < steps; ++step, a += tw_bf16_step_bytes, b += tw_bf16_step_bytes) {
        asm volatile("tileloadd (%0,%1,1), %%tmm6" ::"r"(b), "r"(line) : "memory");
        asm volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(a), "r"(line) : "memory");
        asm volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(a + a_next), "r"(line) : "memory");
        asm volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm6, %%tmm5, %%tmm2" ::: "memory");
        if (G == 2) {
            asm volatile("tileloadd (%0,%1,1), %%tmm7" ::"r"(b + b_next), "r"(line) : "memory");
            asm volatile("tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::: "memory");
        }
    }
    asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(out), "r"(out_line) : "memory");
    asm volatile("tilestored %%tmm2, (%0,%1,1)" ::"r"(below), "r"(out_line) : "memory");
    if (G == 2) asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(out + 16), "r"(out_line) : "memory");
    if (G == 2) asm volatile("tilestored %%tmm3, (%0,%1,1)" ::"r"(below + 16), "r"(out_line) : "memory");
}

// out [rows, 16 * groups of tw_lanes columns] = or += a x b over `steps` of the `all` steps of a row of a (`b_all`: b).
template <bool Add>
static void tw_tile_products(const uint8_t* a, int64_t rows, int64_t all, const uint8_t* b, int64_t groups,
                             int64_t b_all, int64_t steps, float* out) {
    const int64_t next = all * tw_bf16_step_bytes, b_next = b_all * tw_bf16_step_bytes;
    for (int64_t r = 0; r < rows; r += 32)
        for (int64_t g = 0; g < groups; g += 2) {
            float* const to = out + r * tw_lanes + 16 * g;
            const uint8_t *const own = a + r / 16 * next, *const with = b + g * b_next;
            if (g + 2 <= groups) tw_tile_product<Add, 2>(own, next, with, b_next, steps, to);
            else tw_tile_product<Add, 1>(own, next, with, b_next, steps, to);
        }
}

// The state of a tile: the exponent of 2 that weights are measured by, and their sum. The exponent stays until
// a score is 8 above it, so that the sums of values are seldom multiplied by anything.
struct tw_tile_state {
    alignas(64) float top[tw_lanes], total[tw_lanes];
    bool empty;  // no sums of values so far
};

// Scores of keys [begin, end) of 16 queries -> weights; false if the sums so far stay as they are, else times `keep`.
static inline bool tw_weigh(const float* scores, int64_t begin, int64_t end, float factor, float* top, float* total,
                            uint8_t* weights, tw_v16& keep) {
    tw_v16 most[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = tw_load(scores + (begin + i) * tw_lanes);
    for (int64_t key = begin + 4; key < end; key += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const tw_v16 x = tw_load(scores + (key + i) * tw_lanes);
            most[i] = most[i] > x ? most[i] : x;
        }
    const tw_v16 first = most[0] > most[1] ? most[0] : most[1], second = most[2] > most[3] ? most[2] : most[3];
    const tw_v16 found = (first > second ? first : second) * factor, before = tw_load(top);
    const tw_v16 now = found > before + 8.0f ? found : before, none = tw_limits<float>::low - tw_v16{};
    const tw_v16 base = now == none ? tw_v16{} : now, scale = tw_splat(factor);
    tw_v16 sum[4] = {};
    for (int64_t key = begin; key < end; key += 4)
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
            const float* const at = scores + (key + i) * tw_lanes;
            const tw_v16 even = tw_power_of_two(tw_fma(tw_load(at), scale, -base));
            const tw_v16 odd = tw_power_of_two(tw_fma(tw_load(at + tw_lanes), scale, -base));
            sum[i] += even, sum[i + 1] += odd;
            *(tw_u16x32_any*)(weights + 32 * (key + i)) = tw_quick_pairs(even, odd);
        }
    const tw_v16 sums = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const bool raised = __builtin_ia32_cmpps512_mask(now, before, 4, tw_every, 4) != 0;  // now != before
    keep = raised ? tw_power_of_two(before - base) : tw_splat(1);
    tw_put(total, tw_fma(tw_load(total), keep, sums));
    tw_put(top, now);
    return raised;
}

// A block's keys and values in their tiles: made by the first tile of a key head that needs them.
template <class F, class Point>
static const uint8_t* tw_tiled_block(tw_tile_room& room, const tw_query_tile& tile, int64_t block, Point point) {
    const int64_t wide = (tile.features + 31) / 32 * 32, bytes = 64 + (tile.depth + wide) * 2 * tw_keys;
    uint8_t* const own = room.blocks + block % room.capacity * bytes;
    if (room.owner == tile.owner && block >= room.from && block < room.to) return own;
    if (room.owner != tile.owner || block != room.to) room.owner = tile.owner, room.from = room.to = block;
    room.from = tw_most(room.from, ++room.to - room.capacity);
    const int64_t key = block * tw_keys, count = tw_least<int64_t>(tw_keys, tile.end_key - key);
    const void* k_at[tw_keys];
    const float* v_at[tw_keys];
    point(key, count, k_at, v_at);
    tw_tile_keys<F>(k_at, count, tile.depth, own + 64);
    own[0] = tw_tile_values(v_at, count, tile.features, own + 64 + tile.depth * 2 * tw_keys);
    return own;
}

// Values that are not finite, some of which a query does not see: query by query, with zeros in their places.
__attribute__((noinline)) static void tw_mix_apart(const tw_tile_view& view, int64_t lanes, const uint8_t* values,
                                                   int64_t features, const uint8_t* weights, float* sums) {
    const int64_t skipped = view.begin / 32 * tw_bf16_step_bytes;
    for (int64_t f = 0; f < features; f += 16, values += 2 * tw_bf16_step_bytes)
        for (int64_t r = 0; r < lanes; ++r) {
            alignas(64) uint16_t seen[2 * tw_bf16_step_bytes] = {};
            alignas(64) float mixed[32 * tw_lanes] = {};
            for (int64_t i = 0; i < 16; ++i)
                for (int64_t key = view.from[r]; key < view.to[r]; ++key) {
                    const int64_t at = key / 32 * 512 + i * 32 + key % 32;
                    seen[at] = ((const uint16_t*)values)[at];
                }
            for (int64_t i = 0; i < 16; ++i) mixed[i * tw_lanes + r % 32] = sums[(f + i) * tw_lanes + r];
            tw_tile_product<true, 2>((const uint8_t*)seen + skipped, 2 * tw_bf16_step_bytes,
                                     weights + r / 32 * 4 * tw_bf16_step_bytes + skipped, 2 * tw_bf16_step_bytes,
                                     (view.end - view.begin) / 32, mixed);
            for (int64_t i = 0; i < 16; ++i) sums[(f + i) * tw_lanes + r] = mixed[i * tw_lanes + r % 32];
        }
}

// Weights of a block's scores, and the values that they weigh.
static void tw_mix_tile_block(const tw_query_tile& tile, const tw_tile_view& view, int64_t lanes, const uint8_t* block,
                              tw_tile_room& room, tw_tile_state& state) {
    const int64_t wide = (tile.features + 31) / 32 * 32, steps = (view.end - view.begin) / 32;
    for (int64_t g = 0; g < lanes; g += 16) {
        tw_v16 keep;
        uint8_t* const weights = room.weights + g / 16 * 2 * tw_bf16_step_bytes;
        const bool raised = tw_weigh(room.scores + g, view.begin, view.end, tile.factor, state.top + g, state.total + g,
                                     weights, keep);
        if (!raised || state.empty) continue;
        for (int64_t f = 0; f < tile.features; ++f) {
            float* const sum = room.sums + f * tw_lanes + g;
            tw_put(sum, tw_load(sum) * keep);
        }
    }
    const uint8_t* const values = block + 64 + tile.depth * 2 * tw_keys;
    const int64_t skipped = view.begin / 32 * tw_bf16_step_bytes;
    const bool apart = !block[0] && !view.whole, empty = state.empty;
    state.empty = false;
    if (apart && empty) __builtin_memset(room.sums, 0, wide * tw_lanes * sizeof(float));
    if (apart) return tw_mix_apart(view, lanes, values, tile.features, room.weights, room.sums);
    (empty ? tw_tile_products<false> : tw_tile_products<true>)(values + skipped, wide, 2, room.weights + skipped,
                                                              lanes / 16, 2, steps, room.sums);
}

// The sums of values of a tile's queries as rows [count, out_stride], with their greatest scores and sums of weights.
// point(key, count, k_at, v_at): where these keys and values lie. show(key, shown): how many keys of the block nobody
// sees. work(key, scores, view): what is done to scores in place.
template <class F, class Point, class Show, class Work>
static void tw_attend_tile(tw_tile_room& room, const tw_query_tile& tile, Point point, Show show, Work work, float* out,
                           int64_t out_stride, float* greatest, float* total) {
    const int64_t lanes = tw_blocks(tile.count, 32) * 32, steps = tile.depth / 32;
    tw_tile_state state = {};
    state.empty = true;
    for (int64_t r = 0; r < lanes; ++r) state.top[r] = tw_limits<float>::low;
    tw_tile_queries(tile.q, tile.q_stride, tile.count, tile.depth, room.queries);
    int64_t everybody_from = 0, everybody_to = tile.end_key;
    for (int64_t r = 0; r < tile.count; ++r) {
        everybody_from = tw_most(everybody_from, tile.visible_from[r]);
        everybody_to = tw_least(everybody_to, tile.visible_to[r]);
    }
    tw_tile_view view;
    for (int64_t j = 0; j < tw_keys; ++j) view.shown[j] = 1;
    for (int64_t key = tw_most<int64_t>(tile.first_key, 0) / tw_keys * tw_keys; key < tile.last_key; key += tw_keys) {
        const int64_t hidden = show(key, view.shown);
        if (hidden == tw_keys) continue;
        view.begin = 0, view.end = tw_keys;
        view.whole = !hidden && everybody_from <= key && everybody_to >= key + tw_keys;
        if (!view.whole) view.look(tile, lanes, key);
        if (view.begin >= view.end) continue;
        const uint8_t* const block = tw_tiled_block<F>(room, tile, key / tw_keys, point);
        tw_tile_products<false>(block + 64 + view.begin * tile.depth * 2, view.end - view.begin, steps, room.queries,
                                lanes / 16, steps, steps, room.scores + view.begin * tw_lanes);
        work(key, room.scores, view);
        if (!view.whole) view.hide(room.scores, lanes);
        tw_mix_tile_block(tile, view, lanes, block, room, state);
    }
    if (state.empty) __builtin_memset(room.sums, 0, tile.features * tw_lanes * sizeof(float));
    for (int64_t r = 0; r < tile.count; ++r)
        greatest[r] = state.top[r] * 0.693147180559945f, total[r] = state.total[r];
    for (int64_t g = 0; g < tile.count; g += 16)
        for (int64_t f = 0; f < tile.features; f += 16) {
            tw_v16 x[16];
            for (int i = 0; i < 16; ++i) x[i] = tw_load(room.sums + (f + i) * tw_lanes + g);
            tw_transpose(x);
            for (int i = 0; i < 16 && g + i < tile.count; ++i) tw_put(out + (g + i) * out_stride + f, x[i]);
        }
}
#else
static inline bool tw_has_tiled_attention() { return false; }
template <class F, class Point, class Show, class Work>
static void tw_attend_tile(tw_tile_room&, const tw_query_tile&, Point, Show, Work, float*, int64_t, float*, float*) {}
#endif
