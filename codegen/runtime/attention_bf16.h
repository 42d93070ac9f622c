// Attention products of a block of 64 keys in bfloat16 with AMX tiles, sums in float; the softmax between them is that
// of attention.h. For many rows with precision="bf16"; depth a multiple of 32, features a multiple of 16.
//
// Only rows that see the whole block go this way, so that nothing is multiplied that a row does not see, and which way a
// row goes depends on its position alone. The others take the way of attention.h.
//   pairs of keys     [4 groups of 16 keys][depth / 32] tiles: line p holds features 2p, 2p + 1 of 16 keys
//   pairs of values   [features / 16][2] tiles: line p holds keys 2p, 2p + 1 of 16 features

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && !defined(__clang__)
static inline bool tw_has_paired_attention() { return tw_has_tiles; }

template <class F>
__attribute__((noinline)) static void tw_pair_keys(const void* const* keys, int64_t count, int64_t depth, uint8_t* to) {
    for (int64_t first = 0; first < count; first += 16)
        for (int64_t step = 0; step < depth / 32; ++step, to += tw_bf16_step_bytes) {
            tw_v16 x[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const uint8_t* const row = (const uint8_t*)keys[first + i < count ? first + i : count - 1];
                tw_v16 half[2];
                F::unpack(row + 2 * step * F::bytes, half);
                F::unpack(row + (2 * step + 1) * F::bytes, half + 1);
                x[i] = (tw_v16)tw_halves(half[0], half[1]);
            }
            tw_transpose(x);
            for (int i = 0; i < 16; ++i) tw_put((float*)(to + 64 * i), x[i]);
        }
}

__attribute__((noinline)) static void tw_pair_values(const float* const* values, int64_t count, int64_t features, uint8_t* to) {
    for (int64_t f = 0; f < features; f += 16)
        for (int64_t key = 0; key < tw_keys; key += 2, to += 64) {
            const tw_v16 first = key < count ? tw_load(values[key] + f) : tw_v16{};
            const tw_v16 second = key + 1 < count ? tw_load(values[key + 1] + f) : tw_v16{};
            *(tw_u16x32_any*)to = tw_pairs(first, second);
        }
}

// scores[r][key] for `rows` rows of q (tiles as in packed_bf16.h) against `count` keys.
template <class F>
static void tw_score_pairs(const uint16_t* q, int64_t rows, const void* const* keys, int64_t count, int64_t depth,
                           uint8_t* pairs, float* scores) {
    tw_pair_keys<F>(keys, count, depth, pairs);
    tw_amx_matmul(q, depth, rows, pairs, tw_blocks(count, 16), depth / 32, scores, tw_keys);
}

// mixed[r] = sum over the keys of weights[r][key] * values[key].
static void tw_mix_pairs(const uint16_t* weights, int64_t rows, const float* const* values, int64_t count,
                         int64_t features, uint8_t* pairs, float* mixed) {
    tw_pair_values(values, count, features, pairs);
    tw_amx_matmul(weights, tw_keys, rows, pairs, features / 16, 2, mixed, features);
}
#else
static inline bool tw_has_paired_attention() { return false; }
template <class F>
static void tw_score_pairs(const uint16_t*, int64_t, const void* const*, int64_t, int64_t, uint8_t*, float*) {}
static void tw_mix_pairs(const uint16_t*, int64_t, const float* const*, int64_t, int64_t, uint8_t*, float*) {}
#endif

// Rows that see the whole block: their sums so far times `keep`, and what the block adds.
static inline void tw_add_mixed(float* sums, const float* mixed, int64_t features, float keep) {
    for (int64_t f = 0; f < features; f += 16)
        tw_put(sums + f, tw_fma(tw_load(sums + f), tw_splat(keep), tw_load(mixed + f)));
}
static inline void tw_copy_row(float* to, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) tw_put(to + i, tw_load(from + i));
}
