// Software prefetching in products: which lines of the next panels are loaded while the current ones are multiplied.
#pragma once

#include "vec.h"

namespace truffula {
namespace {

// Bytes from a line of each of two panels to the line that is prefetched; 0 prefetches nothing new.
struct PrefetchDistance {
  int64_t first, second;
};
TF_INLINE PrefetchDistance single_panel(PrefetchDistance ahead, int panel) { return {panel ? ahead.second : ahead.first, 0}; }

// Lines prefetched farther ahead may be evicted before they are read; nearer ones arrive too late.
constexpr int64_t kFarthest = 65536, kNearest = 4096;
constexpr int64_t kWithin = 8192;  // the distance within each panel where a group of panels is too large

// The distance for row tile number `tile` of `tiles` over a group of `panels` panels: to the same lines of the next
// group. A single tile prefetches both panels; of several tiles each prefetches one, so that loads are spread over the
// tiles.
TF_INLINE PrefetchDistance prefetch_distance(int tile, int tiles, int panels, int64_t panel_bytes) {
  const int64_t group = panels * panel_bytes;
  const int64_t bytes = group > kFarthest ? kWithin : group * ((kNearest + group - 1) / group);
  return {tiles == 1 || tile == 0 ? bytes : 0, tiles == 1 || tile == 1 ? bytes : 0};
}

template <int NP>
TF_INLINE void prefetch_lines(const uint8_t* line, int64_t panel_bytes, PrefetchDistance ahead) {
  __builtin_prefetch(line + ahead.first, 0, 2);
  if constexpr (NP == 2) __builtin_prefetch(line + panel_bytes + ahead.second, 0, 2);
}

TF_INLINE int tiles_of(int rows, int most) { return (rows + most - 1) / most; }

// The first row of tile number `tile` of `tiles`. With AVX-512 rows are divided evenly: tiles of seven and six are
// faster than twelve and one, as the sums of one row depend on each other. With fewer registers full tiles are fastest.
TF_INLINE int first_row(int rows, int tile, int tiles, int most) {
#if defined(__AVX512F__)
  (void)most;
  return rows * tile / tiles;
#else
  (void)tiles;
  return tile * most < rows ? tile * most : rows;
#endif
}

}  // namespace
}  // namespace truffula
