// A row against features in bfloat16, several at a time: what remains to be done where 8 bits leave
// the choice open.
#pragma once

#include "quantized.h"

namespace saebase {

constexpr int64_t LOOKS_AT_ONCE = 4;

#ifdef __AVX512BF16__

// The row as a sum of two numbers of bfloat16 a channel: within 2^-18 of itself. The processor
// multiplies these exactly and adds up in float32, as if by one fused operation for each product;
// numbers below 2^-126 count as zero.
class WideRow {
  public:
    explicit WideRow(int64_t d) : d_(d), upper_(padded()), lower_(padded()) {
        std::fill(upper_.get(), upper_.get() + padded(), uint16_t(0));
        std::fill(lower_.get(), lower_.get() + padded(), uint16_t(0));
    }
    void load(const float *x) {
        for (int64_t i = 0; i < d_; i += LANES) {
            auto lanes = first_lanes(d_ - i);
            __m512 value = _mm512_maskz_loadu_ps(lanes, x + i);
            __m512i upper = nearest_bfloat16(value);
            store_upper(upper_.get() + i, 0xffff, upper);
            store_upper(lower_.get() + i, 0xffff,
                        nearest_bfloat16(_mm512_sub_ps(value, _mm512_castsi512_ps(upper))));
        }
    }
    // of: features [d]. Writes their products with the row.
    void dots(const uint16_t *const *of, float *products) const {
        __m512 sums[LOOKS_AT_ONCE], rests[LOOKS_AT_ONCE];
        for (int j = 0; j < LOOKS_AT_ONCE; ++j) sums[j] = rests[j] = _mm512_setzero_ps();
        int64_t i = 0;
        for (; i + HALVES <= d_; i += HALVES) add<true>(of, i, sums, rests);
        if (i < d_) add<false>(of, i, sums, rests);
        for (int j = 0; j < LOOKS_AT_ONCE; ++j)
            products[j] = _mm512_reduce_add_ps(_mm512_add_ps(sums[j], rests[j]));
    }

  private:
    static constexpr int64_t HALVES = 2 * LANES;

    template <bool IS_WHOLE>
    void add(const uint16_t *const *of, int64_t i, __m512 *sums, __m512 *rests) const {
        auto upper = (__m512bh)_mm512_loadu_si512(upper_.get() + i);
        auto lower = (__m512bh)_mm512_loadu_si512(lower_.get() + i);
        auto lanes = IS_WHOLE ? __mmask32(-1) : __mmask32((1u << (d_ - i)) - 1);
        for (int j = 0; j < LOOKS_AT_ONCE; ++j) {
            auto feature = (__m512bh)(IS_WHOLE ? _mm512_loadu_si512(of[j] + i)
                                               : _mm512_maskz_loadu_epi16(lanes, of[j] + i));
            sums[j] = _mm512_dpbf16_ps(sums[j], upper, feature);
            rests[j] = _mm512_dpbf16_ps(rests[j], lower, feature);
        }
    }
    int64_t padded() const { return (d_ + HALVES - 1) / HALVES * HALVES; }

    int64_t d_;
    Buffer<uint16_t> upper_, lower_;
};

#else

// The row in float32.
class WideRow {
  public:
    explicit WideRow(int64_t d) : d_(d) {}
    void load(const float *x) { x_ = x; }
    void dots(const uint16_t *const *of, float *products) const {
        __m512 sums[LOOKS_AT_ONCE];
        for (auto &sum : sums) sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < d_; i += LANES) {
            auto lanes = first_lanes(d_ - i);
            __m512 x = _mm512_maskz_loadu_ps(lanes, x_ + i);
            for (int j = 0; j < LOOKS_AT_ONCE; ++j) {
                __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, of[j] + i));
                __m512 feature = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
                sums[j] = _mm512_fmadd_ps(x, feature, sums[j]);
            }
        }
        for (int j = 0; j < LOOKS_AT_ONCE; ++j) products[j] = _mm512_reduce_add_ps(sums[j]);
    }

  private:
    int64_t d_;
    const float *x_ = nullptr;
};

#endif

}  // namespace saebase
