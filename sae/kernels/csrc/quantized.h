// Rows and encoder in 8 bits, packed for the product of select.cpp, with how far off that makes a
// score at most.
//
// A row x and a feature W are rounded to x' = x_scale q (q signed) and W' = W_scale p (p signed,
// stored plus 128). By Cauchy and Schwarz
//
//     |x . W - x' . W'|  <=  |x - x'| |W| + |x'| |W - W'|
//
// where both may be changed beforehand in ways that leave their product as it is (Channels, mix):
// the more even a vector is, the less rounding takes away. A float32 sum of n products, in whatever
// order, is within n 2^-23 |x| |W| of its value. All this is added up here, and rounded up by what
// computing it in float32 can lose.
#pragma once

#include <cmath>

#include "common.h"

namespace saebase {

constexpr int64_t PANEL = 48;     // features that are scored together: three vectors
constexpr int64_t ROW_GROUP = 8;  // rows that are scored together
constexpr int LEVELS = 127;
constexpr float ROUND_UP = 1.001f;
// Below this, numbers count as zero (with their size as error).
constexpr float TINY = 1e-30f;
// Of larger numbers nothing is computed here: products could overflow.
constexpr float LARGE = 1e15f;

// How a vector of n floats was rounded.
struct Rounded {
    float scale;  // of its integers
    float norm;   // of the vector, at least
    float error;  // norm of what rounding took away, at least
    int32_t sum;  // of its integers
};

inline float largest(const float *v, int64_t n) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES)
        most = _mm512_max_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(n - i), v + i)), most);
    return _mm512_reduce_max_ps(most);
}

inline bool is_finite(const float *v, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 part = _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(n - i), v + i));
        if (_mm512_cmp_ps_mask(part, _mm512_set1_ps(LARGE), _CMP_NLE_UQ)) return false;
    }
    return true;
}

// Factors that balance channels: W is multiplied by them before it is rounded, x divided, which
// changes no score but for rounding and keeps a few wide channels from setting every row's scale.
// They only make bounds tighter, so a sample of rows is enough.
struct Channels {
    Buffer<float> of_encoder, of_rows;  // [d]

    Channels(const float *x, int64_t n_rows, int64_t d) : of_encoder(d), of_rows(d) {
        std::fill(of_encoder.get(), of_encoder.get() + d, 0.0f);
        int64_t step = std::max<int64_t>(1, n_rows / 512);
        for (int64_t row = 0; row < n_rows; row += step)
            for (int64_t i = 0; i < d; ++i) of_encoder[i] += x[row * d + i] * x[row * d + i];
        float most = largest(of_encoder.get(), d);
        for (int64_t i = 0; i < d; ++i) {
            float part = most > TINY ? std::max(of_encoder[i] / most, 0x1p-24f) : 1.0f;
            of_encoder[i] = std::sqrt(std::sqrt(part)), of_rows[i] = 1 / of_encoder[i];
        }
    }
};

// An orthogonal mix of 16 channels (Hadamard's), done to x and W alike: a number that is much larger
// than its neighbours is spread over all of them. Five roundings, with the channels' factors.
inline __m512 mix(__m512 v) {
    auto step = [](__m512 v, __m512 across, int bit) {
        auto is_odd = __mmask16(bit == 1 ? 0xaaaa : bit == 2 ? 0xcccc : bit == 4 ? 0xf0f0 : 0xff00);
        __m512 sum = _mm512_add_ps(v, across);
        return _mm512_mask_sub_ps(sum, is_odd, across, v);
    };
    v = step(v, _mm512_permute_ps(v, 0xb1), 1);
    v = step(v, _mm512_permute_ps(v, 0x4e), 2);
    v = step(v, _mm512_shuffle_f32x4(v, v, 0xb1), 4);
    v = step(v, _mm512_shuffle_f32x4(v, v, 0x4e), 8);
    return _mm512_mul_ps(v, _mm512_set1_ps(0.25f));
}

// Channels i to i + 15 of v [n], with zeros from n on.
inline __m512 mixed(const float *v, const float *factors, int64_t i, int64_t n) {
    auto lanes = first_lanes(n - i);
    return mix(_mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, v + i),
                             _mm512_maskz_loadu_ps(lanes, factors + i)));
}

// Channels there are after mixing, and integers that are written.
inline int64_t n_mixed(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Writes n_mixed(n) integers from -127 to 127, plus offset, of v times its channels' factors, mixed.
inline Rounded round_to_int8(const float *v, const float *factors, int64_t n, int8_t *out,
                             int offset) {
    __m512 mosts = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES)
        mosts = _mm512_max_ps(_mm512_abs_ps(mixed(v, factors, i, n)), mosts);
    float most = _mm512_reduce_max_ps(mosts);
    if (!(most > TINY)) {
        std::fill(out, out + n_mixed(n), int8_t(offset));
        float size = 2 * TINY * std::sqrt(float(n_mixed(n)));
        return {1.0f, size, size, 0};
    }
    float scale = most / LEVELS;
    __m512 inverse = _mm512_set1_ps(LEVELS / most), error = _mm512_setzero_ps();
    __m512 square = _mm512_setzero_ps();
    __m512i sum = _mm512_setzero_si512(), shift = _mm512_set1_epi32(offset);
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 scaled = _mm512_mul_ps(mixed(v, factors, i, n), inverse);
        __m512i whole = _mm512_cvtps_epi32(scaled);
        __m512 rest = _mm512_sub_ps(scaled, _mm512_cvtepi32_ps(whole));
        error = _mm512_fmadd_ps(rest, rest, error);
        square = _mm512_fmadd_ps(scaled, scaled, square);
        sum = _mm512_add_epi32(sum, whole);
        _mm_storeu_si128(reinterpret_cast<__m128i *>(out + i),
                         _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, shift)));
    }
    // scaled is within 8 2^-24 of v / scale by norm; that much, doubled, is added to the error.
    float norm = scale * std::sqrt(_mm512_reduce_add_ps(square)) * ROUND_UP;
    float lost = scale * std::sqrt(_mm512_reduce_add_ps(error)) * ROUND_UP + norm * 0x1p-20f;
    return {scale, norm, lost, _mm512_reduce_add_epi32(sum)};
}

// The encoder: [n_features, d] in panels, and in bfloat16.
//
// Feature l * n_panels + p lies in lane l of panel p, so that the first panels are a fair sample.
struct Encoder {
    int64_t n_features, d, n_panels, n_quads;
    Buffer<uint8_t> packed;  // [n_panels, n_quads, PANEL, 4]
    Buffer<uint16_t> low;    // [n_features, d] bfloat16
    // [n_panels * PANEL], as packed. bias: less the threshold, plus slack: what rounding can lose.
    Buffer<float> scale, norm, error, bias, slack;
    Buffer<float> low_error;  // [n_panels * PANEL]: norm of W - low
    float most_norm = 0, most_error = 0;

    Encoder(int64_t n_features, int64_t d)
        : n_features(n_features), d(d), n_panels((n_features + PANEL - 1) / PANEL),
          n_quads(n_mixed(d) / 4), packed(n_panels * n_quads * PANEL * 4), low(n_features * d),
          scale(n_panels * PANEL), norm(n_panels * PANEL), error(n_panels * PANEL),
          bias(n_panels * PANEL), slack(n_panels * PANEL), low_error(n_panels * PANEL) {}

    int64_t feature_at(int64_t place) const {
        return (place % PANEL) * n_panels + place / PANEL;
    }
};

// The nearest number of bfloat16, in the upper half of each lane.
inline __m512i nearest_bfloat16(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);
    return _mm512_and_si512(_mm512_add_epi32(bits, half), _mm512_set1_epi32(int(0xffff0000)));
}

inline void store_upper(uint16_t *to, __mmask16 lanes, __m512i numbers) {
    __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(numbers, 16));
    _mm256_mask_storeu_epi16(to, lanes, halves);
}

// Norm of w - low, times its channels' factors, at least.
inline float round_to_bfloat16(const float *w, const float *factors, int64_t n, uint16_t *low) {
    __m512 square = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) {
        auto lanes = first_lanes(n - i);
        __m512 value = _mm512_maskz_loadu_ps(lanes, w + i);
        __m512i rounded = nearest_bfloat16(value);
        __m512 rest = _mm512_mul_ps(_mm512_sub_ps(value, _mm512_castsi512_ps(rounded)),
                                    _mm512_maskz_loadu_ps(lanes, factors + i));
        square = _mm512_fmadd_ps(rest, rest, square);
        store_upper(low + i, lanes, rounded);
    }
    // Squares of rests below 1e-22 vanish: that much is added.
    return std::sqrt(_mm512_reduce_add_ps(square)) * ROUND_UP + 1e-18f;
}

// thresholds: of each feature, that many apart (0: one for all); null if there are none.
// Returns: false if something is too large, or no number at all.
inline bool pack(Encoder &to, const Channels &channels, const float *W, const float *b,
                 const float *thresholds, int64_t threshold_stride, int64_t n_threads) {
    const float *factors = channels.of_encoder.get();
    bool is_fine = true;
#pragma omp parallel for schedule(dynamic, 8) num_threads(int(n_threads)) reduction(&& : is_fine)
    for (int64_t panel = 0; panel < to.n_panels; ++panel) {
        Buffer<int8_t> integers(LANES * to.n_quads * 4);  // of a vector's features
        auto quads = reinterpret_cast<int32_t *>(to.packed.get()) + panel * to.n_quads * PANEL;
        for (int64_t lane = 0; lane < PANEL; ++lane) {
            int64_t place = panel * PANEL + lane, feature = to.feature_at(place);
            // Features of a panel lie far apart: no processor would guess the next one.
            int64_t later = to.feature_at(std::min(place + 2, to.n_panels * PANEL - 1));
            if (later < to.n_features) prefetch(W + later * to.d, to.d * 4);
            int8_t *its_integers = integers.get() + lane % LANES * to.n_quads * 4;
            if (feature < to.n_features) {
                const float *w = W + feature * to.d;
                float threshold = thresholds ? thresholds[feature * threshold_stride] : 0;
                is_fine = is_fine && is_finite(w, to.d) && is_finite(b + feature, 1) &&
                          is_finite(&threshold, 1);
                // int8_t(q + 128) has the bits of uint8_t(q + 128).
                Rounded rounded = round_to_int8(w, factors, to.d, its_integers, 128);
                to.low_error[place] =
                    round_to_bfloat16(w, factors, to.d, to.low.get() + feature * to.d);
                to.scale[place] = rounded.scale, to.norm[place] = rounded.norm;
                to.error[place] = rounded.error;
                to.slack[place] = (std::abs(b[feature]) + std::abs(threshold)) * 0x1p-21f + 1e-33f;
                to.bias[place] = b[feature] - threshold + to.slack[place];
            } else {
                std::fill(its_integers, its_integers + to.n_quads * 4, int8_t(-128));
                to.scale[place] = to.norm[place] = to.error[place] = to.slack[place] = 0;
                to.bias[place] = -INFINITY;
            }
            if (lane % LANES < LANES - 1) continue;
            __m512i starts = _mm512_mullo_epi32(
                lane_numbers(),
                _mm512_set1_epi32(int(to.n_quads)));
            for (int64_t quad = 0; quad < to.n_quads; ++quad)
                _mm512_store_si512(
                    quads + quad * PANEL + lane / LANES * LANES,
                    _mm512_i32gather_epi32(starts, integers.get() + quad * 4, 4));
        }
    }
    to.most_norm = *std::max_element(to.norm.get(), to.norm.get() + to.n_panels * PANEL);
    to.most_error = *std::max_element(to.error.get(), to.error.get() + to.n_panels * PANEL);
    return is_fine;
}

}  // namespace saebase
