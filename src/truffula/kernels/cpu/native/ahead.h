// What a product asks of memory while it computes: the panels after those at hand.
#pragma once

#include "vec.h"

namespace truffula {
namespace {

// Bytes from a line of each of two panels to the line to ask for; 0 asks for what is there already.
struct Ahead {
  int64_t first, second;
};
TF_INLINE Ahead ahead_alone(Ahead ahead, int panel) { return {panel ? ahead.second : ahead.first, 0}; }

// Beyond so many bytes what was asked for may have gone from the nearest caches before it is read; below so many it
// comes late.
constexpr int64_t kFarthest = 65536, kNearest = 4096;
constexpr int64_t kWithin = 8192;  // where a group is too large: so far ahead in each panel

// For row tile number `tile` of `tiles` over a group of `panels` panels: the same lines of the next group, all at once
// where there is one tile, else a panel per tile, so that memory is busy while the others compute.
TF_INLINE Ahead ahead_of(int tile, int tiles, int panels, int64_t panel_bytes) {
  const int64_t group = panels * panel_bytes;
  const int64_t bytes = group > kFarthest ? kWithin : group * ((kNearest + group - 1) / group);
  return {tiles == 1 || tile == 0 ? bytes : 0, tiles == 1 || tile == 1 ? bytes : 0};
}

template <int NP>
TF_INLINE void read_ahead(const uint8_t* line, int64_t panel_bytes, Ahead ahead) {
  __builtin_prefetch(line + ahead.first, 0, 2);
  if constexpr (NP == 2) __builtin_prefetch(line + panel_bytes + ahead.second, 0, 2);
}

TF_INLINE int tiles_of(int rows, int most) { return (rows + most - 1) / most; }

// The row that tile number `tile` of `tiles` begins with. With AVX-512 rows are cut evenly: a tile of twelve and one of
// one, whose sums wait for one another, take longer than seven and six. With fewer registers full tiles are best.
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
