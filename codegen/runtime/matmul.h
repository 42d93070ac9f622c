// Inner products of rows: out[r][c] = sum over k of a[r][k] * b[c][k].
//
// Each sum runs over the lanes of one vector, k ascending, and ends in one tree, whatever the tile: element (r, c) has
// the same bits for 1 row and for 1000. Rows of `a` are padded with zeros to whole vectors of 64 bytes.
//   a [rows, stride]    b: one pointer per column to a row in format F    out [rows, out_stride]

#if defined(__AVX512F__)
static constexpr int tw_registers = 32;
#else
static constexpr int tw_registers = 8;
#endif

// What is left of a row after its whole blocks; zeros behind it.
template <class F> static inline typename F::vector tw_tail(const uint8_t* row, int64_t begin, int64_t end) {
    typename F::vector w = {};
    for (int64_t k = begin; k < end; ++k) w[k - begin] = F::at(row, k);
    return w;
}

template <class F, int R, int C>
static inline void tw_tile(const typename F::real* a, int64_t stride, int64_t rows, const void* const* b,
                           int64_t columns, int64_t k, typename F::real* out, int64_t out_stride) {
    typedef typename F::vector V;
    typedef typename F::real T;
    constexpr int lanes = 64 / sizeof(T);
    // Rows and columns beyond the last repeat it; their sums are dropped.
    const T* ar[R];
    const uint8_t* br[C];
    // The same place in the rows of the next tile: with short rows the hardware does not see the streams in time.
    const int64_t ahead = columns > 1 ? C * ((const uint8_t*)b[1] - (const uint8_t*)b[0]) : 0;
    for (int r = 0; r < R; ++r) ar[r] = a + (r < rows ? r : rows - 1) * stride;
    for (int c = 0; c < C; ++c) br[c] = (const uint8_t*)b[c < columns ? c : columns - 1];
    V sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r][c] = V{};
    const int64_t blocks = k / F::block;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * F::block;
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            V w[F::vectors];
            if (R == 1)
                for (int line = 0; line < F::bytes; line += 64) __builtin_prefetch(br[c] + block * F::bytes + ahead + line);
            F::unpack(br[c] + block * F::bytes, w);
#pragma GCC unroll 16
            for (int v = 0; v < F::vectors; ++v)
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) sum[r][c] = tw_fma(tw_load(ar[r] + first + v * lanes), w[v], sum[r][c]);
        }
    }
    if (blocks * F::block < k) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            const V w = tw_tail<F>(br[c], blocks * F::block, k);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sum[r][c] = tw_fma(tw_load(ar[r] + blocks * F::block), w, sum[r][c]);
        }
    }
    alignas(64) T result[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) tw_sum_lanes<C>(sum[r], result[r]);
    for (int r = 0; r < R && r < rows; ++r)
        for (int c = 0; c < C && c < columns; ++c) out[r * out_stride + c] = result[r][c];
}

template <class F, int R, int C>
__attribute__((noinline)) static void tw_tiles(const typename F::real* a, int64_t stride, int64_t rows,
                                               const void* const* b, int64_t columns, int64_t k,
                                               typename F::real* out, int64_t out_stride) {
    for (int64_t r = 0; r < rows;) {
        const int64_t left = rows - r;
        if (left == 1) {
            tw_tile<F, 1, C>(a + r * stride, stride, 1, b, columns, k, out + r * out_stride, out_stride);
            r += 1;
        } else {
            tw_tile<F, R, C>(a + r * stride, stride, left, b, columns, k, out + r * out_stride, out_stride);
            r += R;
        }
    }
}

template <class F> struct tw_plain { typedef tw_F32 format; };
template <> struct tw_plain<tw_F64> { typedef tw_F64 format; };

// `decoded`: room for C rows of `stride` numbers. A few rows read the stored blocks straight into registers; many rows
// share one decoded copy that stays in the L1 cache.
template <class F, int Rows, int C>
__attribute__((noinline)) static void tw_matmul(const typename F::real* a, int64_t stride, int64_t rows, const void* const* b,
                             int64_t columns, int64_t k, typename F::real* out, int64_t out_stride,
                             typename F::real* decoded) {
    typedef typename F::vector V;
    typedef typename tw_plain<F>::format P;
    constexpr int R = tw_registers >= 32 ? Rows : 1;
    constexpr int lanes = 64 / sizeof(typename F::real);
    const bool direct = rows <= R || (__is_same(F, P) && k % lanes == 0);
    for (int64_t c = 0; c < columns; c += C) {
        const int64_t width = tw_least((int64_t)C, columns - c);
        if (direct) {
            tw_tiles<F, R, C>(a, stride, rows, b + c, width, k, out + c, out_stride);
            continue;
        }
        const void* rows_of_b[C];
        const int64_t blocks = k / F::block;
        for (int64_t i = 0; i < width; ++i) {
            typename F::real* row = decoded + i * stride;
            rows_of_b[i] = row;
            for (int64_t block = 0; block < blocks; ++block) {
                V w[F::vectors];
                F::unpack((const uint8_t*)b[c + i] + block * F::bytes, w);
#pragma GCC unroll 16
                for (int v = 0; v < F::vectors; ++v) tw_put(row + block * F::block + v * lanes, w[v]);
            }
            if (blocks * F::block < k) tw_put(row + blocks * F::block, tw_tail<F>((const uint8_t*)b[c + i], blocks * F::block, k));
        }
        tw_tiles<P, R, C>(a, stride, rows, rows_of_b, width, tw_blocks(k, lanes) * lanes, out + c, out_stride);
    }
}
