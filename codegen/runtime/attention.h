// Online softmax (Milakov and Gimelshein 2018; Dao et al. 2022): blocks of keys at fixed places, ascending. A query row
// meets exactly its visible keys in that order, so its result does not depend on the queries that share its tile.

static constexpr int tw_key_block = 64, tw_query_block = 16;

// One row against one block: scores[begin, end) -> weights, state (greatest, total) and output updated.
// values: one pointer per key to `features` numbers; out [features].
template <class T>
__attribute__((noinline)) static void tw_attend_block(T* scores, int64_t begin, int64_t end, T& greatest, T& total,
                                   const T* const* values, int64_t features, T* out) {
    tw_fold<T, tw_max_of<T>, 16> top;
    for (int64_t j = begin; j < end; j += 16) top.add(scores + j, tw_least<int64_t>(16, end - j));
    const T block_max = top.result();
    const T new_max = tw_max(greatest, block_max);
    if (new_max == tw_limits<T>::low) return;  // nothing visible so far
    // Lanes by the absolute place in the block: invisible keys weigh nothing.
    tw_fold<T, tw_sum_of<T>, 16> sum;
    for (int64_t j = begin; j < end; ++j) scores[j] = tw_exp(scores[j] - new_max);
    for (int64_t j = begin; j < end; j += 16) sum.add(scores + j, tw_least<int64_t>(16, end - j));
    const T keep = tw_exp(greatest - new_max);
    total = total * keep + sum.result();
    greatest = new_max;
    constexpr int lanes = 64 / sizeof(T);
    typedef decltype(tw_load(out)) V;
    int64_t f = 0;
    for (; f + 4 * lanes <= features; f += 4 * lanes) {
        V acc[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) acc[v] = tw_load(out + f + v * lanes) * keep;
        for (int64_t j = begin; j < end; ++j) {
            const V weight = scores[j] - V{};
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) acc[v] = tw_fma(weight, tw_load(values[j] + f + v * lanes), acc[v]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) tw_put(out + f + v * lanes, acc[v]);
    }
    for (; f + lanes <= features; f += lanes) {
        V acc = tw_load(out + f) * keep;
        for (int64_t j = begin; j < end; ++j) acc = tw_fma(scores[j] - V{}, tw_load(values[j] + f), acc);
        tw_put(out + f, acc);
    }
    for (; f < features; ++f) {
        T acc = out[f] * keep;
        for (int64_t j = begin; j < end; ++j) acc = tw_fma(scores[j], values[j][f], acc);
        out[f] = acc;
    }
}
