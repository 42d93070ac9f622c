// Rows of weights as they are stored: how to read one value, and how to unpack one block into vectors.
//
// A format has `block` values in `bytes` bytes, `unpack` to `vectors` vectors, `at(row, column)` for one value; `tail`
// gives fewer values than a block, filled up with zeros (formats of real blocks never need it). Layouts: ggml-quants.c.
// Where every value of a block is one of 16 or 32, they are computed once and looked up: one permutation per 16 values.

struct tw_F32 {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 16, bytes = 64, vectors = 1;
    static float at(const uint8_t* row, int64_t k) { float x; __builtin_memcpy(&x, row + 4 * k, 4); return x; }
    static void unpack(const uint8_t* p, tw_v16* w) { w[0] = tw_load((const float*)p); }
};
struct tw_F64 {
    typedef tw_v8d vector; typedef double real;
    static constexpr int block = 8, bytes = 64, vectors = 1;
    static double at(const uint8_t* row, int64_t k) { double x; __builtin_memcpy(&x, row + 8 * k, 8); return x; }
    static void unpack(const uint8_t* p, tw_v8d* w) { w[0] = tw_load((const double*)p); }
};
struct tw_F16 {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 16, bytes = 32, vectors = 1;
    static float at(const uint8_t* row, int64_t k) { return tw_half_at(row + 2 * k); }
    static void unpack(const uint8_t* p, tw_v16* w) { w[0] = tw_widen_f16(p); }
};
struct tw_BF16 {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 16, bytes = 32, vectors = 1;
    static float at(const uint8_t* row, int64_t k) {
        uint16_t h; __builtin_memcpy(&h, row + 2 * k, 2); return tw_from_bf16(h);
    }
    static void unpack(const uint8_t* p, tw_v16* w) { w[0] = (tw_v16)(tw_widen_u16(p) << 16); }
};

// value = d * q: d f16, 32 int8
struct tw_Q8_0 {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 32, bytes = 34, vectors = 2;
    static float at(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + k / 32 * 34;
        return tw_half_at(p) * (float)(int8_t)p[2 + k % 32];
    }
    static void unpack(const uint8_t* p, tw_v16* w) {
        const tw_v16 d = tw_splat_half(p);
        w[0] = d * tw_to_float(tw_widen_i8(p + 2));
        w[1] = d * tw_to_float(tw_widen_i8(p + 18));
    }
};

// value = d * (q - 8): d f16, 16 bytes of nibbles, value i low and value i + 16 high in byte i
struct tw_Q4_0 {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 32, bytes = 18, vectors = 2;
    static float at(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + k / 32 * 18;
        return tw_half_at(p) * (float)((p[2 + k % 16] >> (k % 32 / 16 * 4) & 15) - 8);
    }
    static void unpack(const uint8_t* p, tw_v16* w) {
        const tw_v16 table = tw_splat_half(p) * tw_to_float(tw_iota - 8);
        const tw_i16 q = tw_widen_u8(p + 2);
        w[0] = tw_lookup(table, q);
        w[1] = tw_lookup(table, q >> 4);
    }
};
// value = d * q + m: d f16, m f16, nibbles as Q4_0
struct tw_Q4_1 {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 32, bytes = 20, vectors = 2;
    static float at(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + k / 32 * 20;
        return tw_half_at(p) * (float)(p[4 + k % 16] >> (k % 32 / 16 * 4) & 15) + tw_half_at(p + 2);
    }
    static void unpack(const uint8_t* p, tw_v16* w) {
        const tw_v16 table = tw_splat_half(p) * tw_to_float(tw_iota) + tw_splat_half(p + 2);
        const tw_i16 q = tw_widen_u8(p + 4);
        w[0] = tw_lookup(table, q);
        w[1] = tw_lookup(table, q >> 4);
    }
};
// A nibble and its fifth bit, which stands at bit `lane` of `high`, as an index below 32.
static inline tw_i16 tw_five_bits(tw_i16 nibble, int32_t high) {
    return (nibble & 15) | ((tw_splat_int(high << 4) >> tw_iota) & 16);
}
static inline int32_t tw_word_at(const uint8_t* p) { int32_t x; __builtin_memcpy(&x, p, 4); return x; }
// value = d * (q - 16): d f16, 32 fifth bits, nibbles as Q4_0
struct tw_Q5_0 {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 32, bytes = 22, vectors = 2;
    static float at(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + k / 32 * 22;
        const int fifth = (p[2 + k % 32 / 8] >> k % 8 & 1) << 4;
        return tw_half_at(p) * (float)(((p[6 + k % 16] >> (k % 32 / 16 * 4) & 15) | fifth) - 16);
    }
    static void unpack(const uint8_t* p, tw_v16* w) {
        const tw_v16 d = tw_splat_half(p);
        const tw_v16 low = d * tw_to_float(tw_iota - 16), high = d * tw_to_float(tw_iota);
        const tw_i16 q = tw_widen_u8(p + 6);
        const int32_t fifth = tw_word_at(p + 2);
        w[0] = tw_lookup(low, high, tw_five_bits(q, fifth & 0xffff));
        w[1] = tw_lookup(low, high, tw_five_bits(q >> 4, fifth >> 16 & 0xffff));
    }
};
// value = d * q + m: d f16, m f16, 32 fifth bits, nibbles as Q4_0
struct tw_Q5_1 {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 32, bytes = 24, vectors = 2;
    static float at(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + k / 32 * 24;
        const int fifth = (p[4 + k % 32 / 8] >> k % 8 & 1) << 4;
        return tw_half_at(p) * (float)((p[8 + k % 16] >> (k % 32 / 16 * 4) & 15) | fifth) + tw_half_at(p + 2);
    }
    static void unpack(const uint8_t* p, tw_v16* w) {
        const tw_v16 d = tw_splat_half(p), m = tw_splat_half(p + 2);
        const tw_v16 low = d * tw_to_float(tw_iota) + m, high = d * tw_to_float(tw_iota + 16) + m;
        const tw_i16 q = tw_widen_u8(p + 8);
        const int32_t fifth = tw_word_at(p + 4);
        w[0] = tw_lookup(low, high, tw_five_bits(q, fifth & 0xffff));
        w[1] = tw_lookup(low, high, tw_five_bits(q >> 4, fifth >> 16 & 0xffff));
    }
};

// The 6-bit scale and minimum of group g of 8: bytes 0-3 and 4-7 hold those of groups 0-3; byte 8 + i the low nibbles
// of group 4 + i, whose top two bits sit above the six bits of group i.
static inline int tw_scale_of(const uint8_t* s, int g) {
    return g < 4 ? s[g] & 63 : (s[4 + g] & 15) | (s[g - 4] >> 6 << 4);
}
static inline int tw_minimum_of(const uint8_t* s, int g) {
    return g < 4 ? s[4 + g] & 63 : (s[4 + g] >> 4) | (s[g] >> 6 << 4);
}
// value = (d * scale) * q - (dmin * minimum), 8 groups of 32: d, dmin f16, 12 bytes of scales, 128 bytes of nibbles
struct tw_Q4_K {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 256, bytes = 144, vectors = 16;
    static float at(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + k / 256 * 144;
        const int g = (int)(k % 256 / 32);
        const int q = p[16 + g / 2 * 32 + k % 32] >> (g % 2 * 4) & 15;
        const float scale = tw_half_at(p) * (float)tw_scale_of(p + 4, g);
        return scale * (float)q - tw_half_at(p + 2) * (float)tw_minimum_of(p + 4, g);
    }
    static void unpack(const uint8_t* p, tw_v16* w) {
        const float d = tw_half_at(p), dmin = tw_half_at(p + 2);
        const tw_v16 number = tw_to_float(tw_iota);
#pragma GCC unroll 8
        for (int g = 0; g < 8; ++g) {
            const tw_v16 scale = tw_splat(d * (float)tw_scale_of(p + 4, g));
            const tw_v16 table = scale * number - tw_splat(dmin * (float)tw_minimum_of(p + 4, g));
            for (int half = 0; half < 2; ++half)
                w[2 * g + half] = tw_lookup(table, tw_widen_u8(p + 16 + g / 2 * 32 + 16 * half) >> (g % 2 * 4));
        }
    }
};
// as Q4_K with a fifth bit: bit g of byte i of 32 belongs to value i of group g
struct tw_Q5_K {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 256, bytes = 176, vectors = 16;
    static float at(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + k / 256 * 176;
        const int g = (int)(k % 256 / 32);
        const int fifth = (p[16 + k % 32] >> g & 1) << 4;
        const int q = (p[48 + g / 2 * 32 + k % 32] >> (g % 2 * 4) & 15) | fifth;
        const float scale = tw_half_at(p) * (float)tw_scale_of(p + 4, g);
        return scale * (float)q - tw_half_at(p + 2) * (float)tw_minimum_of(p + 4, g);
    }
    static void unpack(const uint8_t* p, tw_v16* w) {
        const float d = tw_half_at(p), dmin = tw_half_at(p + 2);
        const tw_v16 number = tw_to_float(tw_iota), more = tw_to_float(tw_iota + 16);
        const tw_i16 fifth[2] = {tw_widen_u8(p + 16), tw_widen_u8(p + 32)};
#pragma GCC unroll 8
        for (int g = 0; g < 8; ++g) {
            const tw_v16 scale = tw_splat(d * (float)tw_scale_of(p + 4, g));
            const tw_v16 minimum = tw_splat(dmin * (float)tw_minimum_of(p + 4, g));
            const tw_v16 low = scale * number - minimum, high = scale * more - minimum;
            for (int half = 0; half < 2; ++half) {
                const tw_i16 q = tw_widen_u8(p + 48 + g / 2 * 32 + 16 * half) >> (g % 2 * 4);
                w[2 * g + half] = tw_lookup(low, high, (q & 15) | ((fifth[half] << 4 >> g) & 16));
            }
        }
    }
};
// value = (d * scale) * (q - 32), 16 groups of 16: 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, d f16
struct tw_Q6_K {
    typedef tw_v16 vector; typedef float real;
    static constexpr int block = 256, bytes = 210, vectors = 16;
    static float at(const uint8_t* row, int64_t k) {
        const uint8_t* p = row + k / 256 * 210;
        const int i = (int)(k % 256), half = i / 128, part = i % 128 / 32;
        const int low = p[64 * half + part % 2 * 32 + i % 32] >> (part / 2 * 4) & 15;
        const int high = p[128 + 32 * half + i % 32] >> (2 * part) & 3;
        return tw_half_at(p + 208) * (float)(int8_t)p[192 + i / 16] * (float)((low | high << 4) - 32);
    }
    static void unpack(const uint8_t* p, tw_v16* w) {
        const float d = tw_half_at(p + 208);
#pragma GCC unroll 16
        for (int v = 0; v < 16; ++v) {
            const int half = v / 8, part = v % 8 / 2, side = v % 2;
            const tw_i16 low = tw_widen_u8(p + 64 * half + part % 2 * 32 + 16 * side) >> (part / 2 * 4) & 15;
            const tw_i16 high = tw_widen_u8(p + 128 + 32 * half + 16 * side) >> (2 * part) & 3;
            const float scale = d * (float)(int8_t)p[192 + v];
            w[v] = tw_splat(scale) * tw_to_float((low | high << 4) - 32);
        }
    }
};
