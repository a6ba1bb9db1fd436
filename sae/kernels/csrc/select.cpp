// Which features are active in which rows, found in 8 bits and decided in float32.
//
// Three looks, each at fewer features: 8-bit estimates, those that may be active again with the
// encoder in bfloat16, those that still may be in float32. Every bound is proven (quantized.h), so
// the choice is that of float32 scores of all features.

#include <atomic>
#include <memory>
#include <mutex>
#include <numeric>

#include "product.h"
#include "wide_row.h"

using namespace saebase;

namespace {

constexpr int64_t BLOCK_ROWS = 256;
// Features that a row's first guess at its k-th largest score comes from.
constexpr int64_t SAMPLE_PANELS = 3;
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

// What was selected: each row's entries lie in its block's, first to first + n.
struct Selection {
    struct Span {
        int64_t first = 0, n = 0;
    };
    std::vector<Span> of_row;
    std::vector<std::vector<Entry>> of_block;
    std::atomic<int64_t> n_dense{0};

    Selection(int64_t n_rows)
        : of_row(n_rows), of_block((n_rows + BLOCK_ROWS - 1) / BLOCK_ROWS) {}

    void add(int64_t row, const std::vector<Entry> &entries) {
        auto &all = of_block[row / BLOCK_ROWS];
        of_row[row] = {int64_t(all.size()), int64_t(entries.size())};
        all.insert(all.end(), entries.begin(), entries.end());
    }
    // Counts a block's rows with too many candidates. Returns: whether all rows are given up.
    bool add_dense(const Block &block) {
        int64_t n = std::count(block.count.get(), block.count.get() + block.n_rows, -1);
        return (n_dense += n) > most_dense();
    }
    int64_t most_dense() const { return of_row.size() / DENSE_PART; }
};

// values are readable up to a whole number of vectors, here and below.
int64_t count_at_least(const float *values, int64_t n, float limit) {
    int64_t count = 0;
    __m512 limits = _mm512_set1_ps(limit);
    for (int64_t i = 0; i < n; i += LANES)
        count += __builtin_popcount(_mm512_mask_cmp_ps_mask(
            first_lanes(n - i), _mm512_loadu_ps(values + i), limits, _CMP_GE_OQ));
    return count;
}

// A value that at least k of n values reach, and at most k_most if one is found; n >= k.
float value_that_k_reach(const float *values, int64_t n, int64_t k, int64_t k_most) {
    __m512 lows = _mm512_set1_ps(INFINITY), highs = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 part = _mm512_loadu_ps(values + i);
        lows = _mm512_mask_min_ps(lows, first_lanes(n - i), lows, part);
        highs = _mm512_mask_max_ps(highs, first_lanes(n - i), highs, part);
    }
    float low = _mm512_reduce_min_ps(lows), high = _mm512_reduce_max_ps(highs);
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

// Places of vectors' values from low on and below high: n_found of them, ascending.
int64_t find_between(const float *values, int64_t n, float low, float high, int32_t *found) {
    __m512i lanes = lane_numbers();
    __m512 lows = _mm512_set1_ps(low), highs = _mm512_set1_ps(high);
    int64_t n_found = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        __m512 part = _mm512_loadu_ps(values + i);
        __mmask16 is_found = _mm512_mask_cmp_ps_mask(
            _mm512_mask_cmp_ps_mask(first_lanes(n - i), part, lows, _CMP_GE_OQ), part, highs,
            _CMP_LT_OQ);
        __m512i at = _mm512_add_epi32(_mm512_set1_epi32(int(i)), lanes);
        _mm512_storeu_si512(found + n_found, _mm512_maskz_compress_epi32(is_found, at));
        n_found += __builtin_popcount(is_found);
    }
    return n_found;
}

// Features (by their places) of a block's rows, row after row, and something about their scores.
// One list for all rows, so that memory is asked for ahead of its use.
struct Looks {
    std::vector<int32_t> places, rows;
    std::vector<int64_t> starts{0};
    std::vector<float> lower, upper;

    void add(int64_t row, int64_t place) {
        places.push_back(int32_t(place)), rows.push_back(int32_t(row));
    }
    void clear() { places.clear(), rows.clear(), starts.assign(1, 0); }
    void end_row() { starts.push_back(places.size()); }
    int64_t size() const { return places.size(); }
};

// Bounds of scores, less the threshold if there is one, by the encoder in bfloat16.
void look_closer(const Problem &problem, const Encoder &by, const Block &block, Looks &looks) {
    int64_t n = looks.size(), d = problem.d;
    looks.lower.resize(n + LANES), looks.upper.resize(n + LANES);
    auto low_of = [&](int64_t i) {
        return by.low.get() + by.feature_at(looks.places[std::min(i, n - 1)]) * d;
    };
    WideRow x(d);
    for (int64_t first = 0; first < n;) {
        int64_t row = looks.rows[first], last = looks.starts[row + 1];
        x.load(problem.x + block.rows[row] * d);
        for (; first < last; first += LOOKS_AT_ONCE) {
            for (int64_t i = first + AHEAD; i < first + AHEAD + LOOKS_AT_ONCE; ++i)
                prefetch(low_of(i), d * 2);
            const uint16_t *of[LOOKS_AT_ONCE];
            float scores[LOOKS_AT_ONCE];
            for (int64_t j = 0; j < LOOKS_AT_ONCE; ++j) of[j] = low_of(std::min(first + j, last - 1));
            x.dots(of, scores);
            for (int64_t i = first; i < std::min(first + LOOKS_AT_ONCE, last); ++i) {
                int64_t place = looks.places[i];
                float score = scores[i - first] + by.bias[place];
                float slack = block.norm[row] *
                              (by.low_error[place] + by.norm[place] * float(d + 64) * 0x1p-22f);
                looks.lower[i] = score - slack - 2.001f * by.slack[place];
                looks.upper[i] = score + slack;
            }
        }
        first = last;
    }
}

// Scores in float32, into lower.
void look_exactly(const Problem &problem, const Encoder &by, const Block &block, Looks &looks) {
    int64_t n = looks.size(), d = problem.d;
    looks.lower.resize(n);
    for (int64_t i = 0; i < n; ++i) {
        if (i + AHEAD < n)
            prefetch(problem.W + by.feature_at(looks.places[i + AHEAD]) * d, d * 4);
        looks.lower[i] = problem.score(block.rows[looks.rows[i]], by.feature_at(looks.places[i]));
    }
}

// What one thread works in.
struct Workspace {
    Block block;
    Looks likely, others, left;
    std::vector<float> guesses, limits, lower;
    std::vector<int32_t> found;
    std::vector<Entry> entries;

    Workspace(int64_t d, int64_t capacity)
        : block(BLOCK_ROWS, d, capacity), found(capacity + 2 * LANES) {}

    // A row's entries, of all features where there are too many candidates.
    void collect(const Problem &problem, const Encoder &by, int64_t row) {
        entries.clear();
        for (int64_t i = left.starts[row]; i < left.starts[row + 1]; ++i)
            entries.push_back({left.lower[i], int32_t(by.feature_at(left.places[i]))});
        if (block.count[row] >= 0) return;
        for (int64_t f = 0; f < problem.n_features; ++f)
            entries.push_back({problem.score(block.rows[row], f), int32_t(f)});
    }
};

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

// Of the features looked at closer, those whose upper bound reaches the k-th largest lower one.
void keep_contenders(int64_t k, int64_t row, Workspace &in) {
    in.lower.clear();
    for (const Looks *looks : {&in.likely, &in.others})
        in.lower.insert(in.lower.end(), looks->lower.begin() + looks->starts[row],
                        looks->lower.begin() + looks->starts[row + 1]);
    int64_t n = in.lower.size();
    in.lower.resize(n + LANES);
    float limit = in.limits[row];
    if (n >= k) limit = std::max(limit, value_that_k_reach(in.lower.data(), n, k, k));
    for (const Looks *looks : {&in.likely, &in.others})
        for (int64_t i = looks->starts[row]; i < looks->starts[row + 1]; ++i)
            if (looks->upper[i] >= limit) in.left.add(row, looks->places[i]);
}

// Finds what may be among the k largest of each row: likely first, then whatever may beat it.
void find_contenders(const Problem &problem, const Encoder &by, Workspace &in) {
    int64_t k = problem.k;
    Block &block = in.block;
    in.likely.clear(), in.others.clear(), in.left.clear();
    in.guesses.assign(block.n_rows, -INFINITY), in.limits.assign(block.n_rows, 0.0f);
    for (int64_t row = 0; row < block.n_rows; ++row, in.likely.end_row()) {
        const float *estimates = block.estimates_of(row);
        int64_t n = block.count[row];
        if (n > k + 8) in.guesses[row] = value_that_k_reach(estimates, n, k, k + k / 8 + 2);
        int64_t n_found = find_between(estimates, n, in.guesses[row], INFINITY, in.found.data());
        for (int64_t i = 0; i < n_found; ++i)
            in.likely.add(row, block.places_of(row)[in.found[i]]);
    }
    look_closer(problem, by, block, in.likely);
    for (int64_t row = 0; row < block.n_rows; ++row, in.others.end_row()) {
        const float *estimates = block.estimates_of(row);
        int64_t first = in.likely.starts[row], n = in.likely.starts[row + 1] - first;
        // k features score at least this, so what can't reach it isn't chosen.
        if (n >= k)
            in.limits[row] = std::max(0.0f, value_that_k_reach(&in.likely.lower[first], n, k, k));
        int64_t n_found = find_between(estimates, block.count[row],
                                       in.limits[row] - block.most_slack(row, by),
                                       in.guesses[row], in.found.data());
        for (int64_t i = 0; i < n_found; ++i) {
            int64_t place = block.places_of(row)[in.found[i]];
            if (estimates[in.found[i]] + block.slack(row, place, by) >= in.limits[row])
                in.others.add(row, place);
        }
    }
    look_closer(problem, by, block, in.others);
    for (int64_t row = 0; row < block.n_rows; ++row, in.left.end_row()) keep_contenders(k, row, in);
}

// Finds what may be above its threshold.
void find_above(const Problem &problem, const Encoder &by, Workspace &in) {
    const Block &block = in.block;
    in.likely.clear(), in.left.clear();
    for (int64_t row = 0; row < block.n_rows; ++row, in.likely.end_row())
        for (int64_t i = 0; i < block.count[row]; ++i)
            in.likely.add(row, block.places_of(row)[i]);
    look_closer(problem, by, block, in.likely);
    for (int64_t row = 0; row < block.n_rows; ++row, in.left.end_row())
        for (int64_t i = in.likely.starts[row]; i < in.likely.starts[row + 1]; ++i)
            if (in.likely.upper[i] >= 0) in.left.add(row, in.likely.places[i]);
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
    if (n <= block.capacity / 2) return true;
    for (int64_t i = 0; i < n; ++i)
        if (estimates[i] + block.slack(row, places[i], by) > block.cut[row])
            estimates[n_kept] = estimates[i], places[n_kept++] = places[i];
    block.count[row] = int32_t(n_kept);
    return n_kept + PANEL <= block.capacity;
}

bool cannot(Block &, const Encoder &, int64_t, double, const void *) { return false; }

void select_above(const Problem &problem, const Encoder &by, Workspace &in, Selection &to) {
    find_candidates(in.block, by, 0, by.n_panels, cannot, nullptr);
    if (to.add_dense(in.block)) return;
    find_above(problem, by, in);
    look_exactly(problem, by, in.block, in.left);
    for (int64_t row = 0; row < in.block.n_rows; ++row) {
        in.collect(problem, by, row);
        keep_above(problem, in.entries);
        to.add(in.block.rows[row], in.entries);
    }
}

// Cuts that are guesses at first, raised as features go by.
void find_top_candidates(const Problem &problem, const Encoder &by, Block &block) {
    int64_t done = 0;
    for (int64_t next = SAMPLE_PANELS; next < by.n_panels; done = next, next *= 4) {
        find_candidates(block, by, done, next, raise_cut, &problem.k);
        for (int64_t row = 0; row < block.n_rows; ++row)
            if (block.count[row] >= 0)
                raise_cut(block, by, row, double(next) / by.n_panels, &problem.k);
    }
    find_candidates(block, by, done, by.n_panels, raise_cut, &problem.k);
}

// Selects the block's rows. Leaves in rows those whose choice isn't certain with the cut that they
// had, and in cuts what makes it so.
void select_top(const Problem &problem, const Encoder &by, Workspace &in, Selection &to,
                std::vector<int64_t> &rows, std::vector<float> &cuts) {
    rows.clear(), cuts.clear();
    if (to.add_dense(in.block)) return;
    const Block &block = in.block;
    find_contenders(problem, by, in);
    look_exactly(problem, by, block, in.left);
    for (int64_t row = 0; row < block.n_rows; ++row) {
        in.collect(problem, by, row);
        float last = keep_top(problem.k, in.entries);
        if (block.count[row] < 0 || block.cut[row] <= 0 || last > block.cut[row]) {
            to.add(block.rows[row], in.entries);
        } else {
            rows.push_back(block.rows[row]);
            cuts.push_back(last > 0 ? std::nextafter(last, -1.0f) : 0);
        }
    }
}

void select_rows(const Problem &problem, const Channels &channels, const Encoder &by,
                 int64_t first, int64_t last, Workspace &in, Selection &to) {
    std::vector<int64_t> rows(last - first);
    std::iota(rows.begin(), rows.end(), first);
    in.block.load(problem.x, channels, rows);
    if (!problem.k) {
        select_above(problem, by, in, to);
        return;
    }
    std::vector<float> cuts;
    find_top_candidates(problem, by, in.block);
    select_top(problem, by, in, to, rows, cuts);
    while (!rows.empty()) {
        in.block.load(problem.x, channels, rows);
        std::copy(cuts.begin(), cuts.end(), in.block.cut.get());
        find_candidates(in.block, by, 0, by.n_panels, cannot, nullptr);
        select_top(problem, by, in, to, rows, cuts);
    }
}

// The last encoder's memory: fresh pages cost as much as what is written there.
std::mutex kept_guard;
std::unique_ptr<Encoder> kept_encoder;

std::unique_ptr<Encoder> take_encoder(int64_t n_features, int64_t d) {
    std::lock_guard<std::mutex> lock(kept_guard);
    auto found = std::move(kept_encoder);
    if (found && found->n_features == n_features && found->d == d) return found;
    return std::make_unique<Encoder>(n_features, d);
}

void keep_encoder(std::unique_ptr<Encoder> encoder) {
    std::lock_guard<std::mutex> lock(kept_guard);
    kept_encoder = std::move(encoder);
}

}  // namespace

// Selects the k largest positive scores of each row or, if k is 0, all above their threshold.
// Returns: the number of entries, to be fetched with sae_take; -1 if numbers are too large, -2 if
// too many features are active for this to be faster than the dense product.
EXPORT int64_t sae_select(const float *x, const float *W, const float *b, const float *thresholds,
                          int64_t threshold_stride, int64_t n_rows, int64_t n_features, int64_t d,
                          int64_t k, int64_t n_threads, void **selection) {
    Problem problem{x, W, b, thresholds, threshold_stride, n_rows, n_features, d, k};
    *selection = nullptr;
    if (!is_finite(x, n_rows * d)) return -1;
    move_to_large_pages(W, n_features * d * 4);
    Channels channels(x, n_rows, d);
    auto kept = take_encoder(n_features, d);
    Encoder &by = *kept;
    if (!pack(by, channels, W, b, thresholds, threshold_stride, n_threads)) return -1;
    auto made = std::make_unique<Selection>(n_rows);
    int64_t capacity = std::max(std::clamp<int64_t>(n_features / 4, 2048, 4096), 8 * k);
#pragma omp parallel num_threads(int(n_threads))
    {
        Workspace workspace(d, capacity);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < n_rows; first += BLOCK_ROWS)
            if (made->n_dense <= made->most_dense())
                select_rows(problem, channels, by, first, std::min(n_rows, first + BLOCK_ROWS),
                            workspace, *made);
    }
    keep_encoder(std::move(kept));
    if (made->n_dense > made->most_dense()) return -2;
    int64_t n = 0;
    for (const auto &span : made->of_row) n += span.n;
    *selection = made.release();
    return n;
}

// Writes a selection as codes, and frees it.
EXPORT void sae_take(void *selection, float *acts, int64_t *ids, int64_t *offsets) {
    std::unique_ptr<Selection> made(static_cast<Selection *>(selection));
    int64_t n = 0, row = 0;
    offsets[0] = 0;
    for (const auto &span : made->of_row) {
        const Entry *entries = made->of_block[row / BLOCK_ROWS].data() + span.first;
        for (int64_t i = 0; i < span.n; ++i) acts[n] = entries[i].score, ids[n++] = entries[i].feature;
        offsets[++row] = n;
    }
}
