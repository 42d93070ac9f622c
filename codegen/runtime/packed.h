// Weights packed for the CPU ("R16"): 16 rows side by side, one vector lane per row, so that no sum runs across lanes.
//
// A group of 16 rows lies in one piece: first the scales of all its columns, then the codes, both on lines of 64 bytes.
// Per 32 columns a row has as many bytes as in its stored format (K-quants: 2 more per 32 for unpacked 6-bit scales).
//   codes8   8 vectors: byte b of lane l of vector j is the int8 of column 4j + b
//   codes4   4 vectors: byte b of vector i holds column 8i + b in its low half and column 8i + 4 + b in its high half
//   fifth    1 vector: bit p of byte b is the fifth bit of column 4p + b
//   pairs    2 vectors: bits 2q, 2q + 1 of byte b of vector h are bits 4 and 5 of column 16h + 4q + b
//   dense    16 numbers of every column; bfloat16: 16 pairs of every two columns
// A format says: `run` columns share a scale (d) and an offset (m); `unpack`, columns 4j to 4j + 3 of a step of 32 as
// whole numbers q; `codes`, the same as bytes q + zero; `factors`, d and m of a run. value = d * q + m. `center` is
// what `unpack` takes off codes without a sign (tw_centered_factors). Bytes and padding: codegen/runtime/pack.cpp.

typedef uint32_t tw_u32x16 __attribute__((vector_size(64)));
typedef tw_u32x16 tw_u32x16_any __attribute__((aligned(1), may_alias));
typedef uint8_t tw_u8x64 __attribute__((vector_size(64)));

static inline tw_u32x16 tw_words(const uint8_t* p) { return *(const tw_u32x16_any*)p; }
static inline tw_u32x16 tw_all(uint32_t x) { return x - tw_u32x16{}; }
static inline int64_t tw_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes 0 to 3 of every lane (without a sign), minus `Zero`, as numbers. With AVX-512 the byte replaces the low byte of
// the float 2^23, which makes it 2^23 + byte; the rest is subtracted exactly. Sign extension takes a shift more.
template <int Zero> static inline void tw_bytes(tw_u32x16 x, tw_v16* w) {
#if defined(__AVX512BW__) && !defined(__clang__)
    typedef char bytes __attribute__((vector_size(64)));
    const tw_u32x16 exponent = tw_all(0x4b000000u);
    const tw_v16 rest = tw_splat(8388608.0f + Zero);
#pragma GCC unroll 4
    for (uint32_t b = 0; b < 4; ++b) {
        const tw_u32x16 place = ((tw_u32x16)tw_iota & 3) * 4 + b;
        const bytes u = __builtin_ia32_pshufb512_mask((bytes)x, (bytes)place, (bytes)exponent, 0x1111111111111111ull);
        w[b] = (tw_v16)u - rest;
    }
#else
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) w[b] = tw_to_float((tw_i16)(x >> (8 * b) & tw_all(255)) - Zero);
#endif
}

// The low 4 (or 5) bits of byte b of every lane, minus `zero`, as numbers: looked up, or computed without AVX-512.
template <int Bits, int Zero> static inline tw_v16 tw_small_code(tw_u32x16 x) {
#if defined(__AVX512F__) && !defined(__clang__)
    if (Bits == 4) return __builtin_shuffle(tw_to_float(tw_iota - Zero), (tw_i16)x);
    return __builtin_shuffle(tw_to_float(tw_iota - Zero), tw_to_float(tw_iota + 16 - Zero), (tw_i16)x);
#else
    return tw_to_float((tw_i16)(x & tw_all((1u << Bits) - 1)) - Zero);
#endif
}

// Columns 4j to 4j + 3 of the nibbles, as bytes with other bits above the nibble.
static inline tw_u32x16 tw_nibbles(const uint8_t* codes, int j) {
    return tw_words(codes + 64 * (j / 2)) >> (4 * (j % 2));
}
// The high half of every byte: one instruction that multiplies its bits with a matrix, where the CPU has it.
static inline tw_u32x16 tw_high_nibbles(tw_u32x16 x) {
#if defined(__GFNI__) && defined(__AVX512BW__) && !defined(__clang__)
    typedef char bytes __attribute__((vector_size(64)));
    typedef uint64_t words __attribute__((vector_size(64)));
    const words high_to_low = 0x1020408000000000ull - words{};
    return (tw_u32x16)__builtin_ia32_vgf2p8affineqb_v64qi((bytes)x, (bytes)high_to_low, 0);
#else
    return x >> 4 & tw_all(0x0f0f0f0fu);
#endif
}
static inline tw_u32x16 tw_five(const uint8_t* codes, int j) {
    const tw_u32x16 high = tw_words(codes + 256), place = tw_all(0x10101010u);
    return (tw_nibbles(codes, j) & ~place) | ((j < 4 ? high << (4 - j) : high >> (j - 4)) & place);
}
static inline tw_u32x16 tw_six(const uint8_t* codes, int j) {
    const tw_u32x16 high = tw_words(codes + 256 + 64 * (j / 4)), place = tw_all(0x30303030u);
    const int shift = 4 - 2 * (j % 4);
    return (tw_nibbles(codes, j) & tw_all(0x0f0f0f0fu)) | ((shift > 0 ? high << shift : high >> -shift) & place);
}

static inline int tw_byte_at(const uint8_t* codes, int lane, int j, int b) { return codes[64 * j + 4 * lane + b]; }
static inline int tw_nibble_at(const uint8_t* codes, int lane, int k) {
    return tw_byte_at(codes, lane, k / 8, k % 4) >> (k / 4 % 2 * 4) & 15;
}
static inline int tw_fifth_at(const uint8_t* codes, int lane, int k) {
    return (codes[256 + 4 * lane + k % 4] >> (k / 4) & 1) << 4;
}
static inline int tw_pair_at(const uint8_t* codes, int lane, int k) {
    return (codes[256 + 64 * (k / 16) + 4 * lane + k % 4] >> (k / 4 % 4 * 2) & 3) << 4;
}

// 16 float16 scales per 32 columns, and 16 float16 offsets behind them where the format has some.
template <bool Offset> struct tw_legacy_factors {
    static constexpr int run = 32;
    static constexpr bool scaled = true, offset = Offset, centered = Offset;
    static constexpr int bytes = Offset ? 64 : 32;
    static int64_t scale_bytes(int64_t steps) { return steps * bytes; }
    static void factors(const uint8_t* scales, int64_t at, tw_v16& d, tw_v16& m) {
        d = tw_widen_f16(scales + at * bytes);
        if (Offset) m = tw_widen_f16(scales + at * bytes + 32);
    }
    static float d_at(const uint8_t* scales, int64_t at, int lane) { return tw_half_at(scales + at * bytes + 2 * lane); }
    static float m_at(const uint8_t* scales, int64_t at, int lane) {
        return Offset ? tw_half_at(scales + at * bytes + 32 + 2 * lane) : 0.0f;
    }
};
// Per 256 columns: 16 float16 d, 16 float16 dmin, then for each of 8 runs 16 scales and 16 minima of one byte.
struct tw_super_factors {
    static constexpr int run = 32;
    static constexpr bool scaled = true, offset = true, centered = false;
    static int64_t scale_bytes(int64_t steps) { return steps / 8 * 320; }
    static void factors(const uint8_t* scales, int64_t at, tw_v16& d, tw_v16& m) {
        const uint8_t* const super = scales + at / 8 * 320;
        const uint8_t* const own = super + 64 + at % 8 * 32;
        d = tw_widen_f16(super) * tw_to_float(tw_widen_u8(own));
        m = -(tw_widen_f16(super + 32) * tw_to_float(tw_widen_u8(own + 16)));
    }
    static float d_at(const uint8_t* scales, int64_t at, int lane) {
        const uint8_t* const super = scales + at / 8 * 320;
        return tw_half_at(super + 2 * lane) * (float)super[64 + at % 8 * 32 + lane];
    }
    static float m_at(const uint8_t* scales, int64_t at, int lane) {
        const uint8_t* const super = scales + at / 8 * 320;
        return -(tw_half_at(super + 32 + 2 * lane) * (float)super[80 + at % 8 * 32 + lane]);
    }
};
// Per 256 columns: 16 float16 d, then for each of 16 runs 16 scales of one signed byte.
struct tw_q6_factors {
    static constexpr int run = 16;
    static constexpr bool scaled = true, offset = false;
    static int64_t scale_bytes(int64_t steps) { return steps / 8 * 288; }
    static void factors(const uint8_t* scales, int64_t at, tw_v16& d, tw_v16&) {
        const uint8_t* const super = scales + at / 16 * 288;
        d = tw_widen_f16(super) * tw_to_float(tw_widen_i8(super + 32 + at % 16 * 16));
    }
    static float d_at(const uint8_t* scales, int64_t at, int lane) {
        const uint8_t* const super = scales + at / 16 * 288;
        return tw_half_at(super + 2 * lane) * (float)(int8_t)super[32 + at % 16 * 16 + lane];
    }
    static float m_at(const uint8_t*, int64_t, int) { return 0.0f; }
};
struct tw_no_factors {
    static constexpr int run = 32;
    static constexpr bool scaled = false, offset = false, paired = false;
    static int64_t scale_bytes(int64_t) { return 0; }
    static void factors(const uint8_t*, int64_t, tw_v16&, tw_v16&) {}
    static float d_at(const uint8_t*, int64_t, int) { return 1.0f; }
    static float m_at(const uint8_t*, int64_t, int) { return 0.0f; }
};

template <class Factors> struct tw_int8_codes : Factors {
    static constexpr int code_bytes = 512, zero = 128, center = 0;
    static tw_u32x16 codes(const uint8_t* codes, int j) { return tw_words(codes + 64 * j) ^ tw_all(0x80808080u); }
    static void unpack(const uint8_t* codes, int j, tw_v16* w) { tw_bytes<128>(tw_words(codes + 64 * j) ^ tw_all(0x80808080u), w); }
    static float code_at(const uint8_t* codes, int lane, int k) {
        return (float)(int8_t)tw_byte_at(codes, lane, k / 4, k % 4);
    }
};
template <class Factors, int Zero> struct tw_nibble_codes : Factors {
    static constexpr int code_bytes = 256, zero = Zero, center = Factors::centered ? 8 : 0;
    static tw_u32x16 codes(const uint8_t* codes, int j) {
        const tw_u32x16 x = tw_words(codes + 64 * (j / 2));
        return j % 2 ? tw_high_nibbles(x) : x & tw_all(0x0f0f0f0fu);
    }
    static void unpack(const uint8_t* codes, int j, tw_v16* w) {
        const tw_u32x16 x = tw_words(codes + 64 * (j / 2));
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) w[b] = tw_small_code<4, Zero + center>(x >> (8 * b + 4 * (j % 2)));
    }
    static float code_at(const uint8_t* codes, int lane, int k) {
        return (float)(tw_nibble_at(codes, lane, k) - Zero);
    }
};
template <class Factors, int Zero> struct tw_five_bit_codes : Factors {
    static constexpr int code_bytes = 320, zero = Zero, center = Factors::centered ? 16 : 0;
    static tw_u32x16 codes(const uint8_t* codes, int j) { return tw_five(codes, j) & tw_all(0x1f1f1f1fu); }
    static void unpack(const uint8_t* codes, int j, tw_v16* w) {
        const tw_u32x16 x = tw_five(codes, j);
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) w[b] = tw_small_code<5, Zero + center>(x >> (8 * b));
    }
    static float code_at(const uint8_t* codes, int lane, int k) {
        return (float)((tw_nibble_at(codes, lane, k) | tw_fifth_at(codes, lane, k)) - Zero);
    }
};
template <class Factors> struct tw_six_bit_codes : Factors {
    static constexpr int code_bytes = 384, zero = 32, center = 0;
    static tw_u32x16 codes(const uint8_t* codes, int j) { return tw_six(codes, j); }
    static void unpack(const uint8_t* codes, int j, tw_v16* w) {
        tw_bytes<32>(tw_six(codes, j), w);
    }
    static float code_at(const uint8_t* codes, int lane, int k) {
        return (float)((tw_nibble_at(codes, lane, k) | tw_pair_at(codes, lane, k)) - 32);
    }
};
struct tw_R16_F32 : tw_no_factors {
    static constexpr int code_bytes = 2048, center = 0;
    static void unpack(const uint8_t* codes, int j, tw_v16* w) {
        for (int b = 0; b < 4; ++b) w[b] = tw_load((const float*)(codes + 64 * (4 * j + b)));
    }
    static float code_at(const uint8_t* codes, int lane, int k) { return tw_F32::at(codes + 64 * k, lane); }
};
struct tw_R16_F16 : tw_no_factors {
    static constexpr int code_bytes = 1024, center = 0;
    static void unpack(const uint8_t* codes, int j, tw_v16* w) {
        for (int b = 0; b < 4; ++b) tw_F16::unpack(codes + 32 * (4 * j + b), w + b);
    }
    static float code_at(const uint8_t* codes, int lane, int k) { return tw_F16::at(codes + 32 * k, lane); }
};
// Columns k and k + 1 of a row side by side: what instructions for bfloat16 take, and a tile of AMX as it is.
struct tw_R16_BF16 : tw_no_factors {
    static constexpr int code_bytes = 1024, center = 0;
    static constexpr bool paired = true;
    static void unpack(const uint8_t* codes, int j, tw_v16* w) {
        for (int h = 0; h < 2; ++h) {
            const tw_u32x16 pair = tw_words(codes + 64 * (2 * j + h));
            w[2 * h] = (tw_v16)(pair << 16);
            w[2 * h + 1] = (tw_v16)(pair & tw_all(0xffff0000u));
        }
    }
    static float code_at(const uint8_t* codes, int lane, int k) {
        return tw_BF16::at(codes + k / 2 * 64, 2 * lane + k % 2);
    }
};
struct tw_R16_Q8_0 : tw_int8_codes<tw_legacy_factors<false>> {};
struct tw_R16_Q4_0 : tw_nibble_codes<tw_legacy_factors<false>, 8> {};
struct tw_R16_Q4_1 : tw_nibble_codes<tw_legacy_factors<true>, 0> {};
struct tw_R16_Q5_0 : tw_five_bit_codes<tw_legacy_factors<false>, 16> {};
struct tw_R16_Q5_1 : tw_five_bit_codes<tw_legacy_factors<true>, 0> {};
struct tw_R16_Q4_K : tw_nibble_codes<tw_super_factors, 0> {};
struct tw_R16_Q5_K : tw_five_bit_codes<tw_super_factors, 0> {};
struct tw_R16_Q6_K : tw_six_bit_codes<tw_q6_factors> {};

template <class F> static inline int64_t tw_group_bytes(int64_t steps) {
    return tw_lines(F::scale_bytes(steps)) + steps * F::code_bytes;
}

// d and m for what `unpack` gives. Codes without a sign come out as q - center, with m + center * d instead: d * q and m
// are large and of opposite sign, and their sums over k would cancel (SmolLM2, whole model: error 3.2e-5, centered
// 1.9e-5). Only where d and m are float16, so that m + center * d is exact; those of K-quants are products.
template <class F> static inline void tw_centered_factors(const uint8_t* scales, int64_t at, tw_v16& d, tw_v16& m) {
    F::factors(scales, at, d, m);
    if (F::offset) m = tw_fma(d, tw_splat((float)F::center), m);
}

// One value of a packed weight with k columns.
template <class F> static inline float tw_packed_at(const uint8_t* base, int64_t row, int64_t k, int64_t column) {
    const int64_t steps = tw_blocks(k, 32);
    const uint8_t* const group = base + row / 16 * tw_group_bytes<F>(steps);
    const uint8_t* const codes = group + tw_lines(F::scale_bytes(steps)) + column / 32 * F::code_bytes;
    const int lane = (int)(row % 16);
    const float q = F::code_at(codes, lane, (int)(column % 32));
    if (!F::scaled) return q;
    const float d = F::d_at(group, column / F::run, lane);
    return F::offset ? d * q + F::m_at(group, column / F::run, lane) : d * q;
}
