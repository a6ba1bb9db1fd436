// Sums over codes: by row (decode, errors, the acts' gradients) and by feature (both matrices').

#include "common.h"

using namespace saebase;

// error = target - decoded; squares[row] = |error|^2; dots[entry] = error[row] . table[id].
// A row's table rows are read from memory once: the second time they lie in cache.
EXPORT void sae_reconstruct(const float *acts, const int64_t *ids, const int64_t *offsets,
                            int64_t n_rows, const float *target, const float *table,
                            int64_t n_features, int64_t d, float *error, double *squares,
                            float *dots, int64_t n_threads) {
    int64_t total = offsets[n_rows];
    ask_for_large_pages(error, n_rows * d * 4);
    move_to_large_pages(table, n_features * d * 4);
#pragma omp parallel for schedule(dynamic, 16) num_threads(int(n_threads))
    for (int64_t row = 0; row < n_rows; ++row) {
        int64_t first = offsets[row], n = offsets[row + 1] - first;
        float *its_error = error + row * d;
        weighted_sum<true>(target + row * d, table, d, {ids + first, acts + first, n, total - first},
                           its_error);
        double sum = 0;
        for (int64_t i = 0; i < d; i += 4096) {
            int64_t width = std::min<int64_t>(4096, d - i);
            sum += dot(its_error + i, its_error + i, width);
        }
        squares[row] = sum;
        for (int64_t i = first; i < first + n; ++i) dots[i] = dot(its_error, table + ids[i] * d, d);
    }
}

// out[row] = sum of acts * table[id].
EXPORT void sae_sum_by_row(const float *acts, const int64_t *ids, const int64_t *offsets,
                           int64_t n_rows, const float *table, int64_t d, float *out,
                           int64_t n_threads) {
    int64_t total = offsets[n_rows];
#pragma omp parallel for schedule(dynamic, 16) num_threads(int(n_threads))
    for (int64_t row = 0; row < n_rows; ++row) {
        int64_t first = offsets[row], n = offsets[row + 1] - first;
        weighted_sum<false>(nullptr, table, d, {ids + first, acts + first, n, total - first},
                            out + row * d);
    }
}

// dots[entry] = rows[row] . table[id].
EXPORT void sae_dot_by_entry(const int64_t *ids, const int64_t *offsets, int64_t n_rows,
                             const float *rows, const float *table, int64_t d, float *dots,
                             int64_t n_threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(int(n_threads))
    for (int64_t row = 0; row < n_rows; ++row) {
        for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) {
            if (i + AHEAD < offsets[n_rows]) prefetch(table + ids[i + AHEAD] * d, d * 4);
            dots[i] = dot(rows + row * d, table + ids[i] * d, d);
        }
    }
}

// Entries sorted by feature, rows ascending within a feature: order[place] and rows[place], feature
// f at places starts[f] to starts[f + 1]. starts: [n_features + 1].
EXPORT void sae_sort_by_feature(const int64_t *ids, const int64_t *offsets, int64_t n_rows,
                                int64_t n_features, int64_t *starts, int64_t *order,
                                int64_t *rows) {
    std::fill(starts, starts + n_features + 1, 0);
    int64_t n = offsets[n_rows];
    for (int64_t i = 0; i < n; ++i) ++starts[ids[i] + 1];
    for (int64_t f = 0; f < n_features; ++f) starts[f + 1] += starts[f];
    Buffer<int64_t> next(n_features);
    std::copy(starts, starts + n_features, next.get());
    for (int64_t row = 0; row < n_rows; ++row)
        for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i) {
            int64_t place = next[ids[i]]++;
            order[place] = i;
            rows[place] = row;
        }
}

// sums[f] = sum over its entries of weights[entry] * table[row]; totals[f], unless null, of weights.
EXPORT void sae_sum_by_feature(const int64_t *starts, const int64_t *order, const int64_t *rows,
                               int64_t n_features, const float *weights, const float *table,
                               int64_t d, float *sums, float *totals, int64_t n_threads) {
    ask_for_large_pages(sums, n_features * d * 4);
    int64_t n_all = starts[n_features];
#pragma omp parallel for schedule(dynamic, 16) num_threads(int(n_threads))
    for (int64_t f = 0; f < n_features; ++f) {
        int64_t first = starts[f], n = starts[f + 1] - first;
        Buffer<float> sorted(n);
        double total = 0;
        for (int64_t i = 0; i < n; ++i) {
            sorted[i] = weights[order[first + i]];
            total += sorted[i];
        }
        weighted_sum<false>(nullptr, table, d, {rows + first, sorted.get(), n, n_all - first},
                            sums + f * d);
        if (totals) totals[f] = float(total);
    }
}
