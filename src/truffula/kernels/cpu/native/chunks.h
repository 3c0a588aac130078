// How the work of a stage is divided into chunks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "team.h"

namespace truffula {

// A range of indices.
template <class Count>
struct Span {
  Count lo, hi;
};

// Range number `chunk` of `count` indices divided into `chunks`.
template <class Count>
Span<Count> span_of(Count count, int32_t chunk, int32_t chunks) {
  const int64_t n = count;
  return {static_cast<Count>(n * chunk / chunks), static_cast<Count>(n * (chunk + 1) / chunks)};
}

// One chunk per task; several tasks per chunk in a step with more than a phase can have.
inline int32_t chunks_for(int64_t tasks) { return static_cast<int32_t>(std::min<int64_t>(tasks, Team::kMaxChunks / 2)); }

// Products of fewer float32 rows are bound by memory.
constexpr int32_t kFineRows = 16;
constexpr int32_t kMinChunkRows = 4;

constexpr int32_t row_chunks(int32_t count, int32_t team) { return std::min((count + kMinChunkRows - 1) / kMinChunkRows, 4 * team); }

}  // namespace truffula
