// What all kernels share: vectors of 16 floats, dots and sums over rows, memory of large pages.
//
// Every result is computed by one thread in a fixed order, so it doesn't depend on their number.
#pragma once

#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace saebase {

constexpr int64_t LANES = 16;
// Table rows whose memory is asked for before it is used.
constexpr int64_t AHEAD = 8;
constexpr size_t LARGE_PAGE = size_t(2) << 20;

// Ask for large pages: fresh small ones cost more than what is then written to them.
inline void ask_for_large_pages(void *start, size_t n_bytes) {
    auto first = (reinterpret_cast<uintptr_t>(start) + LARGE_PAGE - 1) & ~(LARGE_PAGE - 1);
    auto last = (reinterpret_cast<uintptr_t>(start) + n_bytes) & ~(LARGE_PAGE - 1);
    if (first < last) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
}

// Move a table that is read at random to large pages, once; it keeps its address.
inline void move_to_large_pages(const void *start, size_t n_bytes) {
#ifdef MADV_COLLAPSE
    auto first = (reinterpret_cast<uintptr_t>(start) + LARGE_PAGE - 1) & ~(LARGE_PAGE - 1);
    auto last = (reinterpret_cast<uintptr_t>(start) + n_bytes) & ~(LARGE_PAGE - 1);
    if (first < last) madvise(reinterpret_cast<void *>(first), last - first, MADV_COLLAPSE);
#else
    (void)start, (void)n_bytes;
#endif
}

// Uninitialised memory, aligned to cache lines.
template <typename T> class Buffer {
  public:
    explicit Buffer(size_t n) {
        size_t align = n * sizeof(T) >= LARGE_PAGE / 2 ? LARGE_PAGE : 64;
        size_t n_bytes = std::max<size_t>(align, (n * sizeof(T) + align - 1) / align * align);
        data_ = static_cast<T *>(std::aligned_alloc(align, n_bytes));
        if (!data_) throw std::bad_alloc();
        if (align == LARGE_PAGE) ask_for_large_pages(data_, n_bytes);
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { std::free(data_); }
    T *get() const { return data_; }
    T &operator[](size_t i) const { return data_[i]; }

  private:
    T *data_;
};

inline __mmask16 first_lanes(int64_t n) {
    return n >= LANES ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
}

inline __m512i lane_numbers() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline float dot(const float *a, const float *b, int64_t n) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                      _mm512_setzero_ps()};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; ++j)
            sums[j] = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + j * LANES),
                                      _mm512_loadu_ps(b + i + j * LANES), sums[j]);
    for (int j = 0; i < n; i += LANES, ++j) {
        auto lanes = first_lanes(n - i);
        sums[j] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(lanes, a + i),
                                  _mm512_maskz_loadu_ps(lanes, b + i), sums[j]);
    }
    return _mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

inline void prefetch(const void *start, int64_t n_bytes) {
    auto bytes = static_cast<const char *>(start);
    for (int64_t i = 0; i < n_bytes; i += 64) _mm_prefetch(bytes + i, _MM_HINT_T1);
}

// Entries of a list of table rows, of which n are summed here; memory of those up to n_left is
// asked for ahead of its use.
struct Entries {
    const int64_t *ids;
    const float *weights;
    int64_t n, n_left;
};

// out[0:WIDTH vectors] = sum of weights[i] * table[ids[i]], or base less that; entries are added up
// in their order. IS_FIRST: of the passes over the columns.
template <int WIDTH, bool SUBTRACT, bool IS_FIRST>
inline void weighted_columns(const float *base, const float *table, int64_t d, int64_t column,
                             const Entries &entries, float *out, __mmask16 lanes) {
    __m512 sums[WIDTH];
    for (int j = 0; j < WIDTH; ++j) sums[j] = _mm512_setzero_ps();
    for (int64_t i = 0; i < entries.n; ++i) {
        if (IS_FIRST && i + AHEAD < entries.n_left)
            prefetch(table + entries.ids[i + AHEAD] * d, d * 4);
        const float *row = table + entries.ids[i] * d + column;
        __m512 weight = _mm512_set1_ps(entries.weights[i]);
        for (int j = 0; j < WIDTH; ++j)
            sums[j] = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(lanes, row + j * LANES), sums[j]);
    }
    for (int j = 0; j < WIDTH; ++j) {
        int64_t at = column + j * LANES;
        __m512 sum = sums[j];
        if (SUBTRACT) sum = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, base + at), sum);
        _mm512_mask_storeu_ps(out + at, lanes, sum);
    }
}

template <bool SUBTRACT>
inline void weighted_sum(const float *base, const float *table, int64_t d, const Entries &entries,
                         float *out) {
    constexpr int64_t WIDE = 12 * LANES;
    constexpr __mmask16 ALL = 0xffff;
    int64_t i = 0;
    if (d >= WIDE) {
        weighted_columns<12, SUBTRACT, true>(base, table, d, 0, entries, out, ALL);
        i = WIDE;
    }
    for (; i + WIDE <= d; i += WIDE)
        weighted_columns<12, SUBTRACT, false>(base, table, d, i, entries, out, ALL);
    for (; i + 4 * LANES <= d; i += 4 * LANES)
        weighted_columns<4, SUBTRACT, false>(base, table, d, i, entries, out, ALL);
    for (; i < d; i += LANES)
        weighted_columns<1, SUBTRACT, false>(base, table, d, i, entries, out, first_lanes(d - i));
}

}  // namespace saebase
