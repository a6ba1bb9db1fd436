// Passes over the weights: the projection of a gradient, and Adam.

#include <cmath>

#include "common.h"

using namespace saebase;

// gradient[row] -= (gradient[row] . rows[row]) rows[row]
EXPORT void sae_remove_along(float *gradient, const float *rows, int64_t n_rows, int64_t d,
                             int64_t n_threads) {
#pragma omp parallel for schedule(static) num_threads(int(n_threads))
    for (int64_t row = 0; row < n_rows; ++row) {
        float *of = gradient + row * d;
        const float *along = rows + row * d;
        __m512 factor = _mm512_set1_ps(dot(of, along, d));
        for (int64_t i = 0; i < d; i += LANES) {
            auto lanes = first_lanes(d - i);
            __m512 left = _mm512_fnmadd_ps(factor, _mm512_maskz_loadu_ps(lanes, along + i),
                                           _mm512_maskz_loadu_ps(lanes, of + i));
            _mm512_mask_storeu_ps(of + i, lanes, left);
        }
    }
}

// Adam in place; with unit_rows each row of weight is then divided by its norm.
EXPORT void sae_adam(float *weight, const float *gradient, float *mean, float *square,
                     int64_t n_rows, int64_t d, double lr, double beta1, double beta2, double eps,
                     int64_t t, double grad_scale, int64_t unit_rows, int64_t n_threads) {
    const __m512 b1 = _mm512_set1_ps(float(beta1)), c1 = _mm512_set1_ps(float(1 - beta1));
    const __m512 b2 = _mm512_set1_ps(float(beta2)), c2 = _mm512_set1_ps(float(1 - beta2));
    const __m512 scale = _mm512_set1_ps(float(grad_scale)), epsilon = _mm512_set1_ps(float(eps));
    const __m512 rate = _mm512_set1_ps(float(lr / (1 - std::pow(beta1, double(t)))));
    const __m512 spread = _mm512_set1_ps(float(1 / std::sqrt(1 - std::pow(beta2, double(t)))));
#pragma omp parallel for schedule(static) num_threads(int(n_threads))
    for (int64_t row = 0; row < n_rows; ++row) {
        float *w = weight + row * d, *m = mean + row * d, *v = square + row * d;
        const float *g = gradient + row * d;
        for (int64_t i = 0; i < d; i += LANES) {
            auto lanes = first_lanes(d - i);
            __m512 grad = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, g + i), scale);
            __m512 m1 = _mm512_fmadd_ps(b1, _mm512_maskz_loadu_ps(lanes, m + i),
                                        _mm512_mul_ps(c1, grad));
            __m512 v1 = _mm512_fmadd_ps(b2, _mm512_maskz_loadu_ps(lanes, v + i),
                                        _mm512_mul_ps(c2, _mm512_mul_ps(grad, grad)));
            __m512 size = _mm512_fmadd_ps(_mm512_sqrt_ps(v1), spread, epsilon);
            __m512 w1 = _mm512_fnmadd_ps(rate, _mm512_div_ps(m1, size),
                                         _mm512_maskz_loadu_ps(lanes, w + i));
            _mm512_mask_storeu_ps(m + i, lanes, m1);
            _mm512_mask_storeu_ps(v + i, lanes, v1);
            _mm512_mask_storeu_ps(w + i, lanes, w1);
        }
        if (!unit_rows) continue;
        __m512 norm = _mm512_set1_ps(std::sqrt(dot(w, w, d)));
        for (int64_t i = 0; i < d; i += LANES) {
            auto lanes = first_lanes(d - i);
            __m512 unit = _mm512_div_ps(_mm512_maskz_loadu_ps(lanes, w + i), norm);
            _mm512_mask_storeu_ps(w + i, lanes, unit);
        }
    }
}
