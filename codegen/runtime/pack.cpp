// Packing of stored weights for the CPU; the layout stands in packed.h. Plain C++: it runs once per weight.
//
// A block of a stored format is taken apart into whole numbers, one byte each, and its scales; both are put where the
// lane of the row wants them. Rows beyond the last one are zeros, and so are columns beyond the last one.

#include <stdint.h>
#include <string.h>

namespace {

int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

enum Kind { INT8, NIBBLES, FIVE, SIX, WORDS, HALVES, PAIRS, WHOLE };
enum Scales { LEGACY, LEGACY_OFFSET, SUPER, SUPER_SIX, ROW, NONE };

struct Format { Kind kind; Scales scales; int stored_block, stored_bytes; };

// The order is that of STORED in codegen/packing.py.
const Format formats[] = {
    {WORDS, NONE, 1, 4},             // F32
    {HALVES, NONE, 1, 2},            // F16
    {PAIRS, NONE, 1, 2},             // BF16
    {INT8, LEGACY, 32, 34},          // Q8_0
    {NIBBLES, LEGACY, 32, 18},       // Q4_0
    {NIBBLES, LEGACY_OFFSET, 32, 20},  // Q4_1
    {FIVE, LEGACY, 32, 22},          // Q5_0
    {FIVE, LEGACY_OFFSET, 32, 24},   // Q5_1
    {NIBBLES, SUPER, 256, 144},      // Q4_K
    {FIVE, SUPER, 256, 176},         // Q5_K
    {SIX, SUPER_SIX, 256, 210},      // Q6_K
    {WHOLE, ROW, 1, 4},              // I8, of floats
};

int64_t code_bytes(const Format& f) {
    switch (f.kind) {
        case INT8:
        case WHOLE: return 512;
        case NIBBLES: return 256;
        case FIVE: return 320;
        case SIX: return 384;
        case HALVES:
        case PAIRS: return 1024;
        default: return 2048;
    }
}
int64_t scale_bytes(const Format& f, int64_t steps) {
    switch (f.scales) {
        case LEGACY: return steps * 32;
        case LEGACY_OFFSET: return steps * 64;
        case SUPER: return steps / 8 * 320;
        case SUPER_SIX: return steps / 8 * 288;
        case ROW: return 128;
        default: return 0;
    }
}

// The codes of 32 columns, which start at number `part` of 32 in the stored block `p`.
void take_codes(const Format& f, const uint8_t* p, int part, uint8_t* q) {
    switch (f.kind) {
        case INT8: memcpy(q, p + 2, 32); return;
        case NIBBLES:
        case FIVE:
            if (f.scales == SUPER) {
                const uint8_t* const low = p + f.stored_bytes - 128 + part / 2 * 32;
                for (int i = 0; i < 32; ++i) q[i] = low[i] >> (part % 2 * 4) & 15;
                if (f.kind == FIVE)
                    for (int i = 0; i < 32; ++i) q[i] |= (p[16 + i] >> part & 1) << 4;
                return;
            }
            for (int i = 0; i < 16; ++i) {
                const uint8_t pair = p[f.stored_bytes - 16 + i];
                q[i] = pair & 15;
                q[i + 16] = pair >> 4;
            }
            if (f.kind == FIVE)
                for (int i = 0; i < 32; ++i) q[i] |= (p[f.stored_bytes - 20 + i / 8] >> i % 8 & 1) << 4;
            return;
        default: {  // SIX
            const uint8_t* const low = p + part / 4 * 64 + part % 2 * 32;
            const uint8_t* const high = p + 128 + part / 4 * 32;
            for (int i = 0; i < 32; ++i)
                q[i] = (low[i] >> (part % 4 / 2 * 4) & 15) | (high[i] >> (part % 4 * 2) & 3) << 4;
        }
    }
}

// 32 codes to their places in lane `lane` of the codes of a step.
void put_codes(Kind kind, const uint8_t* q, int lane, uint8_t* codes) {
    if (kind == INT8) {
        for (int j = 0; j < 8; ++j) memcpy(codes + 64 * j + 4 * lane, q + 4 * j, 4);
        return;
    }
    for (int i = 0; i < 4; ++i)
        for (int b = 0; b < 4; ++b)
            codes[64 * i + 4 * lane + b] = (q[8 * i + b] & 15) | (q[8 * i + 4 + b] & 15) << 4;
    if (kind == FIVE)
        for (int b = 0; b < 4; ++b) {
            uint8_t bits = 0;
            for (int g = 0; g < 8; ++g) bits |= (q[4 * g + b] >> 4 & 1) << g;
            codes[256 + 4 * lane + b] = bits;
        }
    if (kind == SIX)
        for (int h = 0; h < 2; ++h)
            for (int b = 0; b < 4; ++b) {
                uint8_t bits = 0;
                for (int g = 0; g < 4; ++g) bits |= (q[16 * h + 4 * g + b] >> 4 & 3) << (2 * g);
                codes[256 + 64 * h + 4 * lane + b] = bits;
            }
}

// Six-bit scale and minimum of run g: bytes 0-3 and 4-7 hold those of runs 0-3, see graph/formats/k_quants.py.
int scale_of(const uint8_t* s, int g) { return g < 4 ? s[g] & 63 : (s[4 + g] & 15) | (s[g - 4] >> 6 << 4); }
int minimum_of(const uint8_t* s, int g) { return g < 4 ? s[4 + g] & 63 : (s[4 + g] >> 4) | (s[g] >> 6 << 4); }

// The scales of stored block number `at` of a row.
void put_scales(const Format& f, const uint8_t* p, int lane, int64_t at, uint8_t* scales) {
    if (f.scales == LEGACY || f.scales == LEGACY_OFFSET) {
        uint8_t* const own = scales + at * (f.scales == LEGACY ? 32 : 64);
        memcpy(own + 2 * lane, p, 2);
        if (f.scales == LEGACY_OFFSET) memcpy(own + 32 + 2 * lane, p + 2, 2);
    } else if (f.scales == SUPER) {
        uint8_t* const own = scales + at * 320;
        memcpy(own + 2 * lane, p, 2);
        memcpy(own + 32 + 2 * lane, p + 2, 2);
        for (int g = 0; g < 8; ++g) {
            own[64 + 32 * g + lane] = (uint8_t)scale_of(p + 4, g);
            own[80 + 32 * g + lane] = (uint8_t)minimum_of(p + 4, g);
        }
    } else if (f.scales == SUPER_SIX) {
        uint8_t* const own = scales + at * 288;
        memcpy(own + 2 * lane, p + 208, 2);
        for (int g = 0; g < 16; ++g) own[32 + 16 * g + lane] = p[192 + g];
    }
}

// Whole tiles of 64 columns where a row has one scale.
int64_t bytes_of_group(const Format& f, int64_t steps) {
    return lines(scale_bytes(f, steps)) + (f.kind == WHOLE ? (steps + 1) / 2 * 2 : steps) * code_bytes(f);
}

// A row of floats in int8: scale = greatest / 127, each number to nearest, and the sum of these. A row with a NaN has a scale that is one.
void pack_whole(const uint8_t* row, int64_t k, int lane, uint8_t* scales, uint8_t* codes) {
    float greatest = 0, x, whole;
    int32_t sum = 0;
    for (int64_t c = 0; c < k; ++c) {
        memcpy(&x, row + 4 * c, 4);
        x = x < 0 ? -x : x;
        if (!(x <= greatest) && greatest == greatest) greatest = x;
    }
    const float scale = greatest / 127;
    memcpy(scales + 4 * lane, &scale, 4);
    if (!(scale > 0 && scale < 1e38f)) return;
    for (int64_t c = 0; c < k; ++c) {
        memcpy(&x, row + 4 * c, 4);
        whole = x / scale + 12582912.0f;  // 1.5 * 2^23: the whole number stands in the low byte
        memcpy(codes + c / 4 * 64 + 4 * lane + c % 4, &whole, 1);
        sum += (int8_t)codes[c / 4 * 64 + 4 * lane + c % 4];
    }
    memcpy(scales + 64 + 4 * lane, &sum, 4);
}

void pack_row(const Format& f, const uint8_t* row, int64_t k, int lane, uint8_t* scales, uint8_t* codes) {
    if (f.kind == WHOLE) {
        pack_whole(row, k, lane, scales, codes);
        return;
    }
    if (f.kind == PAIRS) {
        for (int64_t c = 0; c < k; ++c) memcpy(codes + (c / 2 * 16 + lane) * 4 + c % 2 * 2, row + c * 2, 2);
        return;
    }
    if (f.kind == WORDS || f.kind == HALVES) {
        const int size = f.kind == WORDS ? 4 : 2;
        for (int64_t c = 0; c < k; ++c) memcpy(codes + (16 * c + lane) * size, row + c * size, size);
        return;
    }
    const int64_t size = code_bytes(f);
    const int parts = f.stored_block / 32;
    for (int64_t block = 0; block < k / f.stored_block; ++block) {
        const uint8_t* const p = row + block * f.stored_bytes;
        put_scales(f, p, lane, block, scales);
        for (int part = 0; part < parts; ++part) {
            uint8_t q[32];
            take_codes(f, p, part, q);
            put_codes(f.kind, q, lane, codes + (block * parts + part) * size);
        }
    }
}

}

extern "C" {

// Bytes of the packed weight.
int64_t tw_packed_bytes(int32_t format, int64_t rows, int64_t k) {
    const Format& f = formats[format];
    const int64_t steps = (k + 31) / 32;
    return (rows + 15) / 16 * bytes_of_group(f, steps);
}

// Groups first to last - 1 of the weight [rows, k] at `from`, rows of `row_bytes`, into zeroed memory at `to`.
void tw_pack(int32_t format, const uint8_t* from, int64_t rows, int64_t k, int64_t row_bytes, uint8_t* to, int64_t first,
             int64_t last) {
    const Format& f = formats[format];
    const int64_t steps = (k + 31) / 32, scales = lines(scale_bytes(f, steps));
    const int64_t group_bytes = bytes_of_group(f, steps);
    for (int64_t group = first; group < last; ++group)
        for (int lane = 0; lane < 16 && 16 * group + lane < rows; ++lane) {
            uint8_t* const own = to + group * group_bytes;
            pack_row(f, from + (16 * group + lane) * row_bytes, k, lane, own, own + scales);
        }
}

}
