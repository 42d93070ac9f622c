// The greatest entries of every row of a product, found while it is made: one sorted list per thread and row.
//
// NaN comes before all numbers; of equals the lower place comes first, whichever thread met it. A thread meets the
// columns of a row in ascending order.
//   room   8 KiB of counters, zero before and after every run, then per thread: found [rows], values [rows, Count] in
//          steps of 8 bytes, places [rows, Count]

static constexpr int64_t tw_lists_begin = 8192;

template <class T, int Count> struct tw_best {
    int64_t* arrived;
    char* lists;
    int64_t rows, thread, threads, stride;

    tw_best(void* room, int64_t rows, int64_t thread, int64_t threads)
        : arrived((int64_t*)room), lists((char*)room + tw_lists_begin), rows(rows), thread(thread), threads(threads),
          stride(tw_blocks(rows * 8 * (1 + 2 * Count), 64) * 64) {
        for (int64_t row = 0; row < rows; ++row) found(thread, row) = 0;
    }
    int64_t& found(int64_t of, int64_t row) const { return ((int64_t*)(lists + of * stride))[row]; }
    T* values(int64_t of, int64_t row) const {
        return (T*)(lists + of * stride + rows * 8) + row * Count;
    }
    int64_t* places(int64_t of, int64_t row) const {
        return (int64_t*)(lists + of * stride + rows * 8 * (1 + Count)) + row * Count;
    }

    static bool beats(T a, T b) { return (a > b) | ((a != a) & (b == b)); }
    static bool precedes(T a, int64_t a_place, T b, int64_t b_place) {
        return beats(a, b) || (!beats(b, a) && a_place < b_place);
    }
    // Puts an entry where it belongs, or nowhere.
    static void insert(T* value, int64_t* place, int64_t& count, T x, int64_t at) {
        int64_t i = count;
        if (count < Count) ++count;
        else if (precedes(x, at, value[Count - 1], place[Count - 1])) i = Count - 1;
        else return;
        for (; i > 0 && precedes(x, at, value[i - 1], place[i - 1]); --i) value[i] = value[i - 1], place[i] = place[i - 1];
        value[i] = x, place[i] = at;
    }
    // `width` entries of a row, whose places begin at `first`.
    void add(int64_t row, const T* x, int64_t width, int64_t first) const {
        T* const value = values(thread, row);
        int64_t& count = found(thread, row);
        if (count == Count) {
            const T last = value[Count - 1];
            int better = 0;
            for (int64_t j = 0; j < width; ++j) better |= !(x[j] <= last);
            if (!better) return;
        }
        for (int64_t j = 0; j < width; ++j) insert(value, places(thread, row), count, x[j], first + j);
    }
    // Whether all other threads are done: true for one thread of every run.
    bool is_last() const {
        if (__atomic_add_fetch(arrived, 1, __ATOMIC_ACQ_REL) < threads) return false;
        __atomic_store_n(arrived, 0, __ATOMIC_RELAXED);
        return true;
    }
    // The lists of all threads in the first one's.
    void join(int64_t row) const {
        for (int64_t other = 1; other < threads; ++other)
            for (int64_t i = 0; i < found(other, row); ++i)
                insert(values(0, row), places(0, row), found(0, row), values(other, row)[i], places(other, row)[i]);
    }
    T value(int64_t row, int64_t rank) const { return values(0, row)[rank]; }
    int64_t place(int64_t row, int64_t rank) const { return places(0, row)[rank]; }
};
