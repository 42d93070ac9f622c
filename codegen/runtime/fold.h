// Reductions: W lanes of running states, joined by a fixed tree at the end. The order of the operations depends on
// the extents only, never on how rows are grouped or shared out, so a row has the same bits in every call.

template <class T> struct tw_limits;
template <> struct tw_limits<float> {
    static constexpr float low = -__builtin_inff(), high = __builtin_inff();
};
template <> struct tw_limits<double> {
    static constexpr double low = -__builtin_inf(), high = __builtin_inf();
};
template <> struct tw_limits<bool> { static constexpr bool low = false, high = true; };
template <> struct tw_limits<uint8_t> { static constexpr uint8_t low = 0, high = 255; };
template <> struct tw_limits<int8_t> { static constexpr int8_t low = -128, high = 127; };
template <> struct tw_limits<int16_t> { static constexpr int16_t low = -32768, high = 32767; };
template <> struct tw_limits<int32_t> { static constexpr int32_t low = -2147483647 - 1, high = 2147483647; };
template <> struct tw_limits<int64_t> {
    static constexpr int64_t low = -9223372036854775807l - 1, high = 9223372036854775807l;
};

template <class T> struct tw_sum_of {
    static constexpr T init = 0; static T join(T a, T b) { return (T)(a + b); }
};
template <class T> struct tw_prod_of {
    static constexpr T init = 1; static T join(T a, T b) { return (T)(a * b); }
};
template <class T> struct tw_max_of {
    static constexpr T init = tw_limits<T>::low; static T join(T a, T b) { return tw_max(a, b); }
};
template <class T> struct tw_min_of {
    static constexpr T init = tw_limits<T>::high; static T join(T a, T b) { return tw_min(a, b); }
};
template <class T> struct tw_any_of {
    static constexpr T init = 0; static T join(T a, T b) { return (T)((a != 0) | (b != 0)); }
};
template <class T> struct tw_all_of {
    static constexpr T init = 1; static T join(T a, T b) { return (T)((a != 0) & (b != 0)); }
};

template <class T, class M, int W> struct tw_fold {
    alignas(64) T lane[W];
    tw_fold() { for (int l = 0; l < W; ++l) lane[l] = M::init; }
    void add(const T* chunk, int64_t count) {
        if (count == W) {
            for (int l = 0; l < W; ++l) lane[l] = M::join(lane[l], chunk[l]);
        } else {
            for (int64_t l = 0; l < count; ++l) lane[l] = M::join(lane[l], chunk[l]);
        }
    }
    T result() {
        for (int half = W / 2; half; half /= 2)
            for (int l = 0; l < half; ++l) lane[l] = M::join(lane[l], lane[l + half]);
        return lane[0];
    }
};

// A sum of floats keeps its 64 lanes in four vectors: the same tree, without a way through memory between two of its
// joins (a layer norm of 384 numbers takes 110 ns, and took 131).
template <> struct tw_fold<float, tw_sum_of<float>, 64> {
    typedef float quarter __attribute__((vector_size(64)));
    quarter lane[4] = {};
    void add(const float* chunk, int64_t count) {
        alignas(64) float filled[64];
        if (count != 64) {  // no lane is -0, so that 0 behind the last number changes none
            for (int l = 0; l < 64; ++l) filled[l] = l < count ? chunk[l] : 0.0f;
            chunk = filled;
        }
        for (int i = 0; i < 4; ++i) lane[i] += *(const quarter*)(chunk + 16 * i);
    }
    float result() {
        quarter x = (lane[0] + lane[2]) + (lane[1] + lane[3]);
#define TW_BEHIND(...) x += __builtin_shufflevector(x, x, __VA_ARGS__)
        TW_BEHIND(8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
        TW_BEHIND(4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
        TW_BEHIND(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        TW_BEHIND(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#undef TW_BEHIND
        return x[0];
    }
};

// The position of the greatest (least) element: ties go to the lowest position, the first NaN wins.
template <class T, bool greatest> struct tw_arg_fold {
    T best = 0;
    int64_t at = 0, position = 0;
    bool any = false;
    static bool beats(T a, T b) { return (greatest ? a > b : a < b) | ((a != a) & (b == b)); }
    void add(const T* chunk, int64_t count) {
        bool better = !any;
        for (int64_t l = 0; l < count; ++l) better |= beats(chunk[l], best);
        if (better) {
            for (int64_t l = 0; l < count; ++l) {
                if (any && !beats(chunk[l], best)) continue;
                best = chunk[l]; at = position + l; any = true;
            }
        }
        position += count;
    }
    int64_t result() const { return at; }
};
