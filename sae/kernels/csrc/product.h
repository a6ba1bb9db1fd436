// The 8-bit product of a block of rows with the encoder: scores are compared with their row's cut
// while they lie in registers, and only those that may be above it are written to memory.
#pragma once

#include <vector>

#include "quantized.h"

namespace saebase {

constexpr int64_t PANEL_VECTORS = PANEL / LANES;

// Rows in 8 bits, by groups, with each row's cut and its candidates. Its memory is used again for
// one set of rows after the other.
struct Block {
    int64_t n_rows = 0, most_rows, d, capacity;
    std::vector<int64_t> rows;  // where they are in the batch
    Buffer<int8_t> integers;    // [n_quads * 4], of one row
    Buffer<int8_t> packed;      // [groups, n_quads, ROW_GROUP, 4]
    Buffer<float> scale, norm, error, cut;  // error: with the float32 sums' own
    Buffer<int32_t> offset;                 // what storing 128 more added to each product
    Buffer<int32_t> count;                  // candidates; -1: there are too many
    Buffer<float> estimates;                // [n_rows, capacity + LANES]
    Buffer<int32_t> places;

    Block(int64_t most_rows, int64_t d, int64_t capacity)
        : most_rows(most_rows), d(d), capacity(capacity), integers(n_quads() * 4),
          packed(padded(most_rows) * n_quads() * 4), scale(padded(most_rows)),
          norm(padded(most_rows)), error(padded(most_rows)), cut(padded(most_rows)),
          offset(padded(most_rows)), count(padded(most_rows)),
          estimates(padded(most_rows) * stride()), places(padded(most_rows) * stride()) {}

    void load(const float *x, const Channels &channels, const std::vector<int64_t> &which) {
        rows = which, n_rows = which.size();
        for (int64_t i = 0; i < padded(n_rows); ++i) pack(x, channels, i);
    }
    static int64_t padded(int64_t n) { return (n + ROW_GROUP - 1) / ROW_GROUP * ROW_GROUP; }
    int64_t n_quads() const { return n_mixed(d) / 4; }
    int64_t stride() const { return capacity + LANES; }

    const float *estimates_of(int64_t row) const { return estimates.get() + row * stride(); }
    const int32_t *places_of(int64_t row) const { return places.get() + row * stride(); }

    // How far a row's estimate of the feature at place can be from its score.
    float slack(int64_t row, int64_t place, const Encoder &by) const {
        return error[row] * by.norm[place] + norm[row] * by.error[place];
    }
    // The same of any feature.
    float most_slack(int64_t row, const Encoder &by) const {
        return error[row] * by.most_norm + norm[row] * by.most_error;
    }

  private:
    void pack(const float *x, const Channels &channels, int64_t i) {
        std::fill(integers.get(), integers.get() + n_quads() * 4, int8_t(0));
        Rounded rounded{0, 0, 0, 0};
        if (i < n_rows)
            rounded =
                round_to_int8(x + rows[i] * d, channels.of_rows.get(), d, integers.get(), 0);
        auto from = reinterpret_cast<const int32_t *>(integers.get());
        auto to = reinterpret_cast<int32_t *>(packed.get()) +
                  i / ROW_GROUP * n_quads() * ROW_GROUP + i % ROW_GROUP;
        for (int64_t quad = 0; quad < n_quads(); ++quad) to[quad * ROW_GROUP] = from[quad];
        scale[i] = rounded.scale, offset[i] = 128 * rounded.sum;
        norm[i] = rounded.norm + rounded.error;
        // Two float32 sums (ours and the dense product's) and the arithmetic on estimates.
        error[i] = rounded.error * ROUND_UP + rounded.norm * float(d + 64) * 0x1p-22f;
        count[i] = 0, cut[i] = i < n_rows ? 0 : INFINITY;
    }
};

struct Scores {
    __m512i of[ROW_GROUP][PANEL_VECTORS];
};

// Not inlined: surrounded by other code, compilers run out of registers here.
__attribute__((noinline)) inline void multiply(const uint8_t *features, const int8_t *rows,
                                               int64_t n_quads, Scores &scores) {
    __m512i sums[ROW_GROUP][PANEL_VECTORS];  // local, so that they stay in registers
#pragma GCC unroll 8
    for (int i = 0; i < ROW_GROUP; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < PANEL_VECTORS; ++j) sums[i][j] = _mm512_setzero_si512();
    auto quads = reinterpret_cast<const int32_t *>(rows);
    for (int64_t quad = 0; quad < n_quads; ++quad) {
        __m512i f[PANEL_VECTORS];
#pragma GCC unroll 3
        for (int j = 0; j < PANEL_VECTORS; ++j) f[j] = _mm512_load_si512(features + 64 * j);
#pragma GCC unroll 8
        for (int i = 0; i < ROW_GROUP; ++i) {
            __m512i row = _mm512_set1_epi32(quads[i]);
#pragma GCC unroll 3
            for (int j = 0; j < PANEL_VECTORS; ++j)
                sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], f[j], row);
        }
        features += 4 * PANEL, quads += ROW_GROUP;
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROW_GROUP; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < PANEL_VECTORS; ++j) scores.of[i][j] = sums[i][j];
}

// Makes room among a row's candidates, given the fraction of features done; false if it can't.
using MakeRoom = bool (*)(Block &, const Encoder &, int64_t row, double done, const void *context);

inline void append(Block &block, int64_t row, __mmask16 chosen, __m512 estimate, int64_t place) {
    const __m512i lanes = lane_numbers();
    int64_t at = row * block.stride() + block.count[row];
    __m512i its_places = _mm512_add_epi32(_mm512_set1_epi32(int(place)), lanes);
    _mm512_storeu_ps(block.estimates.get() + at, _mm512_maskz_compress_ps(chosen, estimate));
    _mm512_storeu_si512(block.places.get() + at, _mm512_maskz_compress_epi32(chosen, its_places));
    block.count[row] += __builtin_popcount(chosen);
}

// Scores panels first to last - 1 and appends what may be above its row's cut.
__attribute__((noinline)) inline void find_candidates(Block &block, const Encoder &by, int64_t first, int64_t last,
                            MakeRoom make_room, const void *context) {
    for (int64_t panel = first; panel < last; ++panel) {
        const uint8_t *features = by.packed.get() + panel * by.n_quads * PANEL * 4;
        for (int64_t group = 0; group < Block::padded(block.n_rows); group += ROW_GROUP) {
            Scores scores;
            multiply(features, block.packed.get() + group * by.n_quads * 4, by.n_quads, scores);
            __m512 scale[PANEL_VECTORS], norm[PANEL_VECTORS], error[PANEL_VECTORS],
                bias[PANEL_VECTORS];
            for (int j = 0; j < PANEL_VECTORS; ++j) {
                int64_t place = panel * PANEL + j * LANES;
                scale[j] = _mm512_load_ps(by.scale.get() + place);
                norm[j] = _mm512_load_ps(by.norm.get() + place);
                error[j] = _mm512_load_ps(by.error.get() + place);
                bias[j] = _mm512_load_ps(by.bias.get() + place);
            }
#pragma GCC unroll 8
            for (int i = 0; i < ROW_GROUP; ++i) {
                int64_t row = group + i;
                __m512 row_scale = _mm512_set1_ps(block.scale[row]);
                __m512 row_error = _mm512_set1_ps(block.error[row]);
                __m512 row_norm = _mm512_set1_ps(block.norm[row]);
                __m512 cut = _mm512_set1_ps(block.cut[row]);
                __m512i offset = _mm512_set1_epi32(block.offset[row]);
                __m512 estimates[PANEL_VECTORS];
                __mmask16 chosen[PANEL_VECTORS];
#pragma GCC unroll 3
                for (int j = 0; j < PANEL_VECTORS; ++j) {
                    __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(scores.of[i][j], offset));
                    estimates[j] =
                        _mm512_fmadd_ps(_mm512_mul_ps(product, scale[j]), row_scale, bias[j]);
                    __m512 upper = _mm512_fmadd_ps(
                        row_error, norm[j], _mm512_fmadd_ps(row_norm, error[j], estimates[j]));
                    chosen[j] = _mm512_cmp_ps_mask(upper, cut, _CMP_GT_OQ);
                }
                if (!(chosen[0] | chosen[1] | chosen[2])) continue;
                if (block.count[row] + PANEL > block.capacity &&
                    !make_room(block, by, row, double(panel) / by.n_panels, context)) {
                    block.count[row] = -1, block.cut[row] = INFINITY;
                    continue;
                }
                for (int j = 0; j < PANEL_VECTORS; ++j)
                    if (chosen[j])
                        append(block, row, chosen[j], estimates[j], panel * PANEL + j * LANES);
            }
        }
    }
}

}  // namespace saebase
