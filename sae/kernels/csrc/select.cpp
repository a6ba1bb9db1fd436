// Which features are active in which rows, found in 8 bits and decided in float32.
//
// Three looks, each at fewer features: 8-bit estimates, those that may be active again with the
// encoder in bfloat16, those that still may be in float32. Every bound is proven (quantized.h), so
// the choice is that of float32 scores of all features.

#include <atomic>
#include <memory>

#include "product.h"

using namespace saebase;

namespace {

constexpr int64_t BLOCK_ROWS = 256;
// Features that a row's first guess at its k-th largest score comes from.
constexpr int64_t SAMPLE_PANELS = 11;
// More rows than this part of the batch with too many candidates: the dense product is faster.
constexpr int64_t DENSE_PART = 16;

struct Problem {
    const float *x, *W, *b, *thresholds;
    int64_t threshold_stride, n_rows, n_features, d, k;  // k: 0 if by threshold

    float threshold_of(int64_t feature) const { return thresholds[feature * threshold_stride]; }
    float score(int64_t row, int64_t feature) const {
        return dot(x + row * d, W + feature * d, d) + b[feature];
    }
};

struct Entry {
    float score;
    int32_t feature;
};

// Larger scores first; of equal ones, smaller features.
bool is_before(const Entry &a, const Entry &b) {
    return a.score != b.score ? a.score > b.score : a.feature < b.feature;
}

struct Selection {
    std::vector<std::vector<Entry>> of_row;
    std::atomic<int64_t> n_dense{0};
};

int64_t count_at_least(const float *values, int64_t n, float limit) {
    int64_t count = 0;
    __m512 limits = _mm512_set1_ps(limit);
    for (int64_t i = 0; i < n; i += LANES)
        count += __builtin_popcount(_mm512_mask_cmp_ps_mask(
            first_lanes(n - i), _mm512_loadu_ps(values + i), limits, _CMP_GE_OQ));
    return count;
}

// A value that at least k of n values reach, and at most k_most if one is found; n >= k. values
// must be readable up to a whole number of vectors.
float value_that_k_reach(const float *values, int64_t n, int64_t k, int64_t k_most) {
    auto [low_at, high_at] = std::minmax_element(values, values + n);
    float low = *low_at, high = *high_at;
    if (n <= k_most) return low;
    for (int i = 0; i < 24; ++i) {
        float middle = low + (high - low) * 0.5f;
        int64_t count = count_at_least(values, n, middle);
        if (count >= k) low = middle;
        else high = middle;
        if (count >= k && count <= k_most) break;
    }
    return low;
}

float dot_low(const float *x, const uint16_t *low, int64_t n) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                      _mm512_setzero_ps()};
    auto widen = [](__m256i part) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
    };
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; ++j) {
            auto part = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(low + i + j * LANES));
            sums[j] = _mm512_fmadd_ps(_mm512_loadu_ps(x + i + j * LANES), widen(part), sums[j]);
        }
    for (; i < n; i += LANES) {
        auto lanes = first_lanes(n - i);
        sums[0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, x + i),
                                  widen(_mm256_maskz_loadu_epi16(lanes, low + i)), sums[0]);
    }
    return _mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// A row's candidates looked at again: bounds of their scores, less the threshold if there is one,
// from the encoder in bfloat16.
struct Second {
    std::vector<int32_t> features;
    std::vector<float> lower, upper;  // readable up to a whole number of vectors
};

struct Row {
    const Problem &problem;
    const Encoder &by;
    const Block &block;
    int64_t at, in_batch, n;
    const float *estimates;
    const int32_t *places;

    Row(const Problem &problem, const Encoder &by, const Block &block, int64_t at)
        : problem(problem), by(by), block(block), at(at), in_batch(block.rows[at]),
          n(block.count[at]), estimates(block.estimates.get() + at * block.stride()),
          places(block.places.get() + at * block.stride()) {}

    template <typename Wanted> void look_again(Second &second, Wanted is_wanted) const {
        const float *x = problem.x + in_batch * problem.d;
        size_t first = second.features.size();
        for (int64_t i = 0; i < n; ++i)
            if (is_wanted(i)) second.features.push_back(int32_t(by.feature_at(places[i])));
        size_t n_found = second.features.size();
        second.lower.resize(n_found + LANES), second.upper.resize(n_found + LANES);
        for (size_t i = first; i < n_found; ++i) {
            if (i + 4 < n_found)
                prefetch(by.low.get() + second.features[i + 4] * problem.d, problem.d * 2);
            int64_t feature = second.features[i], place = by.place_of(feature);
            float score = dot_low(x, by.low.get() + feature * problem.d, problem.d) + by.bias[place];
            float slack = block.norm[at] * (by.low_error[feature] +
                                            by.norm[place] * float(problem.d + 64) * 0x1p-22f);
            second.lower[i] = score - slack - 2.001f * by.slack[place];
            second.upper[i] = score + slack;
        }
    }

    // Adds the entries, scored in float32, of those whose upper bound reaches limit.
    void decide(const Second &second, float limit, std::vector<Entry> &entries) const {
        size_t first = entries.size();
        for (size_t i = 0; i < second.features.size(); ++i)
            if (second.upper[i] >= limit) entries.push_back({0, second.features[i]});
        for (size_t i = first; i < entries.size(); ++i) {
            if (i + 3 < entries.size())
                prefetch(problem.W + entries[i + 3].feature * problem.d, problem.d * 4);
            entries[i].score = problem.score(in_batch, entries[i].feature);
        }
    }
};

// Scores of all features, where there are too many candidates.
void add_all(const Problem &problem, int64_t row, std::vector<Entry> &entries) {
    for (int64_t f = 0; f < problem.n_features; ++f)
        entries.push_back({problem.score(row, f), int32_t(f)});
}

// What is above its threshold, in the order of features.
void keep_above(const Problem &problem, std::vector<Entry> &entries) {
    auto end = std::remove_if(entries.begin(), entries.end(), [&](const Entry &entry) {
        return !(entry.score > problem.threshold_of(entry.feature));
    });
    entries.erase(end, entries.end());
    std::sort(entries.begin(), entries.end(),
              [](const Entry &a, const Entry &b) { return a.feature < b.feature; });
}

// The k largest that are positive, in the order of features. Returns: the k-th score, 0 if fewer
// are positive.
float keep_top(int64_t k, std::vector<Entry> &entries) {
    auto end = std::remove_if(entries.begin(), entries.end(),
                              [](const Entry &entry) { return !(entry.score > 0); });
    entries.erase(end, entries.end());
    float last = 0;
    if (int64_t(entries.size()) >= k) {
        std::nth_element(entries.begin(), entries.begin() + (k - 1), entries.end(), is_before);
        last = entries[k - 1].score;
        entries.resize(k);
    }
    std::sort(entries.begin(), entries.end(),
              [](const Entry &a, const Entry &b) { return a.feature < b.feature; });
    return last;
}

// The k largest among a row's candidates.
float top_of_candidates(const Row &row, int64_t k, Second &second, std::vector<Entry> &entries) {
    second.features.clear();
    float limit = 0;
    if (row.n > k + 8) {
        float guess = value_that_k_reach(row.estimates, row.n, k, k + k / 8 + 2);
        row.look_again(second, [&](int64_t i) { return row.estimates[i] >= guess; });
        int64_t n = second.features.size();
        // k features score at least this, so what can't reach it isn't chosen.
        limit = std::max(limit, value_that_k_reach(second.lower.data(), n, k, k));
        row.look_again(second, [&](int64_t i) {
            return row.estimates[i] < guess && row.block.upper(row.at, i, row.by) >= limit;
        });
    } else {
        row.look_again(second, [](int64_t) { return true; });
    }
    int64_t n = second.features.size();
    if (n >= k) limit = std::max(limit, value_that_k_reach(second.lower.data(), n, k, k));
    row.decide(second, limit, entries);
    return keep_top(k, entries);
}

// Raises the row's cut to a guess at its k-th largest score, and drops candidates below.
bool raise_cut(Block &block, const Encoder &by, int64_t row, double done, const void *k_of) {
    double rank = double(*static_cast<const int64_t *>(k_of)) * done;
    auto generous = int64_t(rank + 2.5 * std::sqrt(rank) + 2);
    float *estimates = block.estimates.get() + row * block.stride();
    int32_t *places = block.places.get() + row * block.stride();
    int64_t n = block.count[row], n_kept = 0;
    if (n <= generous) return false;
    float guess = value_that_k_reach(estimates, n, generous, generous + generous / 4 + 1);
    block.cut[row] = std::max(block.cut[row], guess);
    for (int64_t i = 0; i < n; ++i)
        if (block.upper(row, i, by) > block.cut[row])
            estimates[n_kept] = estimates[i], places[n_kept++] = places[i];
    block.count[row] = int32_t(n_kept);
    return n_kept + PANEL <= block.capacity;
}

bool cannot(Block &, const Encoder &, int64_t, double, const void *) { return false; }

void select_above(const Problem &problem, const Encoder &by, Block &block, Selection &to) {
    find_candidates(block, by, 0, by.n_panels, cannot, nullptr);
    Second second;
    for (int64_t i = 0; i < block.n_rows; ++i) {
        auto &entries = to.of_row[block.rows[i]];
        if (block.count[i] < 0) {
            if (++to.n_dense > problem.n_rows / DENSE_PART) return;
            add_all(problem, block.rows[i], entries);
        } else {
            Row row(problem, by, block, i);
            second.features.clear();
            row.look_again(second, [&](int64_t j) { return block.upper(i, j, by) > 0; });
            row.decide(second, 0, entries);
        }
        keep_above(problem, entries);
    }
}

// Rows whose choice can't be certain with the cut that they had, and a cut that makes it so.
struct Doubtful {
    std::vector<int64_t> rows;
    std::vector<float> cuts;
};

Doubtful select_top(const Problem &problem, const Encoder &by, Block &block, bool is_first,
                    Selection &to) {
    if (is_first) {
        int64_t done = 0;
        for (int64_t next = SAMPLE_PANELS; next < by.n_panels; done = next, next *= 4) {
            find_candidates(block, by, done, next, raise_cut, &problem.k);
            for (int64_t i = 0; i < block.n_rows; ++i)
                if (block.count[i] >= 0)
                    raise_cut(block, by, i, double(next) / by.n_panels, &problem.k);
        }
        find_candidates(block, by, done, by.n_panels, raise_cut, &problem.k);
    } else {
        find_candidates(block, by, 0, by.n_panels, cannot, nullptr);
    }
    Doubtful doubtful;
    Second second;
    for (int64_t i = 0; i < block.n_rows; ++i) {
        auto &entries = to.of_row[block.rows[i]];
        if (block.count[i] < 0) {
            if (++to.n_dense > problem.n_rows / DENSE_PART) return {};
            add_all(problem, block.rows[i], entries);
            keep_top(problem.k, entries);
            continue;
        }
        float last = top_of_candidates(Row(problem, by, block, i), problem.k, second, entries);
        if (block.cut[i] <= 0 || last > block.cut[i]) continue;
        entries.clear();
        doubtful.rows.push_back(block.rows[i]);
        doubtful.cuts.push_back(last > 0 ? std::nextafter(last, -1.0f) : 0);
    }
    return doubtful;
}

void select_rows(const Problem &problem, const Encoder &by, int64_t first, int64_t last,
                 Selection &to) {
    std::vector<int64_t> rows;
    for (int64_t row = first; row < last; ++row) rows.push_back(row);
    int64_t capacity = std::max<int64_t>(1024, problem.k * 8);
    if (!problem.k) {
        capacity = std::clamp<int64_t>(problem.n_features / 4, 1024, 4096);
        Block block(problem.x, std::move(rows), problem.d, capacity);
        select_above(problem, by, block, to);
        return;
    }
    std::vector<float> cuts(rows.size(), 0.0f);
    for (bool is_first = true; !rows.empty() && to.n_dense <= problem.n_rows / DENSE_PART;
         is_first = false) {
        Block block(problem.x, std::move(rows), problem.d, capacity);
        std::copy(cuts.begin(), cuts.end(), block.cut.get());
        Doubtful doubtful = select_top(problem, by, block, is_first, to);
        rows = std::move(doubtful.rows), cuts = std::move(doubtful.cuts);
    }
}

}  // namespace

// Selects the k largest positive scores of each row or, if k is 0, all above their threshold.
// Returns: the number of entries, to be fetched with sae_take; -1 if numbers are too large, -2 if
// too many features are active for this to be faster than the dense product.
EXPORT int64_t sae_select(const float *x, const float *W, const float *b, const float *thresholds,
                          int64_t threshold_stride, int64_t n_rows, int64_t n_features, int64_t d,
                          int64_t k, int64_t n_threads, void **selection) {
    Problem problem{x, W, b, thresholds, threshold_stride, n_rows, n_features, d, k};
    Encoder by(n_features, d);
    *selection = nullptr;
    if (!is_finite(x, n_rows * d) || !pack(by, W, b, thresholds, threshold_stride, n_threads))
        return -1;
    auto made = std::make_unique<Selection>();
    made->of_row.resize(n_rows);
    int64_t n_blocks = (n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(n_threads))
    for (int64_t block = 0; block < n_blocks; ++block)
        if (made->n_dense <= n_rows / DENSE_PART)
            select_rows(problem, by, block * BLOCK_ROWS,
                        std::min(n_rows, (block + 1) * BLOCK_ROWS), *made);
    if (made->n_dense > n_rows / DENSE_PART) return -2;
    int64_t n = 0;
    for (const auto &entries : made->of_row) n += entries.size();
    *selection = made.release();
    return n;
}

// Writes a selection as codes, and frees it.
EXPORT void sae_take(void *selection, float *acts, int64_t *ids, int64_t *offsets) {
    std::unique_ptr<Selection> made(static_cast<Selection *>(selection));
    int64_t n = 0, row = 0;
    offsets[0] = 0;
    for (const auto &entries : made->of_row) {
        for (const Entry &entry : entries) acts[n] = entry.score, ids[n++] = entry.feature;
        offsets[++row] = n;
    }
}
