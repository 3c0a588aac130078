// Products with packed matrices in tiles (Intel AMX): 16 rows of x times a panel in one instruction. A panel's lines
// have the layout of such an instruction's second operand, so the packing is that of all other tables.
//
// bfloat16: inputs are processed in groups of 32. In a group the products of even and of odd inputs are summed in one
// ascending chain each, from zero; the two are added, and their sum is added to the output's. Denormals are zero. Only
// this table sums in that order (TDPBF16PS in Intel's manual); it is the same for every row of every tile. Integers:
// sums of a block are exact, so the results equal those of all tables.
#pragma once

#include "prefetch.h"
#include "quant.inc.h"
#include "vec.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define TRUFFULA_TILES 1

namespace truffula {
namespace {

constexpr int kTile = kXRows;            // rows and outputs of a tile
constexpr int kTileLines = 16;           // lines of pairs in a tile of a bfloat16 panel: 32 inputs
constexpr int kUnpackedBlocks = 32;      // unpacked at a time, of a panel with fewer than 8 bits
constexpr int kLeastTileRows = 10;        // with fewer rows, quantised products are faster without tiles

// Registers 0 .. 3 hold sums, 4 and 5 rows of x, 6 and 7 lines of panels.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes(int x_bytes, int lines) {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? x_bytes : 64);
      rows[i] = (uint8_t)(i < 6 ? kTile : lines);
    }
  }
};
static_assert(sizeof(TileShapes) == 64, "what LDTILECFG reads");

// gcc's intrinsics do not declare which memory they read, so earlier writes must be completed.
#define TF_WRITTEN() __asm__ volatile("" ::: "memory")

TF_INLINE void take_shapes(const TileShapes& shapes) {
#if defined(TRUFFULA_EMULATED_SET)
  _tile_loadconfig(&shapes);
#else  // gcc's intrinsic declares eight bytes as read, and may drop the stores to the others
  __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
#endif
}

// Whether a product uses tiles: always with bfloat16 pairs, whose sums must have one order; quantised ones with enough
// rows.
TF_INLINE bool tiled(const LinearCall* c) {
  if (!c->quantised_x) return false;
  return !is_quantised(c->w.format) || c->rows >= kLeastTileRows;
}

// Configures the tile registers of this thread, and releases them at the end: then a task switch does not save them.
class Tiles {
 public:
  explicit Tiles(const LinearCall* c) : used_(tiled(c)) {
    if (!used_) return;
    const TileShapes shapes = is_quantised(c->w.format) ? TileShapes(kBlock, kBlock / 4) : TileShapes(64, kTileLines);
    take_shapes(shapes);
  }
  ~Tiles() {
    if (used_) _tile_release();
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  const bool used_;
};

// 32 inputs of up to 32 rows times up to two panels.
template <int RT, int NP>
TF_INLINE void pair_step(const uint8_t* x, int64_t stride, const uint8_t* lines, int64_t panel_bytes) {
  _tile_loadd(6, lines, 64);
  if constexpr (NP == 2) _tile_loadd(7, lines + panel_bytes, 64);
  _tile_loadd(4, x, stride);
  if constexpr (RT == 2) _tile_loadd(5, x + kTile * stride, stride);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (NP == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (RT == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (RT == 2 && NP == 2) _tile_dpbf16ps(3, 5, 7);
}

// y[r, 16 p ...] = x[r] W^T of RT tiles of rows and NP panels of `lines` lines. STREAM: lines `ahead` are prefetched.
template <int RT, int NP, bool STREAM>
static void pair_tiles(const uint8_t* x, int64_t stride, const uint8_t* panel, int64_t panel_bytes, int64_t lines,
                       float* y, int64_t y_stride, PrefetchDistance ahead) {
  _tile_zero(0);
  if constexpr (NP == 2) _tile_zero(1);
  if constexpr (RT == 2) _tile_zero(2);
  if constexpr (RT == 2 && NP == 2) _tile_zero(3);
  int64_t at = 0;
  for (; at + kTileLines <= lines; at += kTileLines) {
    if constexpr (STREAM)
      for (int i = 0; i < kTileLines; ++i) prefetch_lines<NP>(panel + 64 * (at + i), panel_bytes, ahead);
    pair_step<RT, NP>(x + 4 * at, stride, panel + 64 * at, panel_bytes);
  }
  if (at < lines) {  // the rest of the tile is zero, as x's is
    alignas(64) uint8_t rest[NP][kTileLines * 64];
    memset(rest, 0, sizeof rest);
    for (int p = 0; p < NP; ++p) memcpy(rest[p], panel + p * panel_bytes + 64 * at, (size_t)(64 * (lines - at)));
    TF_WRITTEN();
    pair_step<RT, NP>(x + 4 * at, stride, rest[0], kTileLines * 64);
  }
  const int64_t row = 4 * y_stride;
  _tile_stored(0, y, row);
  if constexpr (NP == 2) _tile_stored(1, y + kLanes, row);
  if constexpr (RT == 2) _tile_stored(2, y + kTile * y_stride, row);
  if constexpr (RT == 2 && NP == 2) _tile_stored(3, y + kTile * y_stride + kLanes, row);
}

// Rows of x in bfloat16 pairs. Writes whole tiles of y, beyond `rows` too. `first`: these are the first rows of their
// panels, whose successors are prefetched once.
static void pair_tile_product(int rows, int panels, const uint8_t* x, int64_t stride, const uint8_t* panel,
                              int64_t panel_bytes, float* y, int64_t y_stride, bool first) {
  const int tiles = tiles_of(rows, 2 * kTile);
  for (int t = 0; t < tiles; ++t) {
    const int r = 2 * kTile * t;
    const uint8_t* from = x + r * stride;
    float* to = y + r * y_stride;
    const int64_t lines = panel_bytes / 64;
    const PrefetchDistance ahead = first ? prefetch_distance(t, tiles, panels, panel_bytes) : PrefetchDistance{0, 0};
#define TF_TILES(rt, np)                                                                                    \
  (ahead.first || ahead.second ? pair_tiles<rt, np, true>(from, stride, panel, panel_bytes, lines, to, y_stride, ahead) \
                               : pair_tiles<rt, np, false>(from, stride, panel, panel_bytes, lines, to, y_stride, ahead))
    if (rows - r > kTile) panels == 2 ? TF_TILES(2, 2) : TF_TILES(2, 1);
    else panels == 2 ? TF_TILES(1, 2) : TF_TILES(1, 1);
#undef TF_TILES
  }
}

// Unpacks blocks of less than 8 bits to lines of bytes.
template <int FORMAT>
static void unpack_blocks(const uint8_t* lines, int blocks, uint8_t* to) {
  for (int block = 0; block < blocks; ++block, lines += 64 * lines_of(FORMAT), to += 512)
    for (int j = 0; j < 4; ++j) {
      I low, high;
      nibbles_of<FORMAT>(&low, &high, lines, j);
      store_line(to + 64 * j, low);
      store_line(to + 64 * (j + 4), high);
    }
}

// Sums of one block for 16 rows and 16 outputs. Weights are signed bytes (kQ8_0), or unsigned with their offset in
// BlockHead::correction.
#define TF_BYTE_STEP(sum, b)                                           \
  do {                                                                 \
    _tile_zero(sum);                                                   \
    _tile_loadd(4, x + (b) * x_block_bytes(FORMAT) + sizeof(BlockHead), stride); \
    _tile_loadd(6, lines + (b) * 512, 64);                             \
    if constexpr (FORMAT == kQ8_0) _tile_dpbssd(sum, 4, 6);            \
    else _tile_dpbsud(sum, 4, 6);                                      \
    _tile_stored(sum, sums[sum], 64);                                  \
  } while (0)

// Adds a block to the sums of 16 rows, in the order of `quant_tile`.
template <int FORMAT>
TF_INLINE void add_block(V (&acc)[kTile], const int32_t* sums, const uint8_t* x, int64_t stride, const uint8_t* scales) {
  const V scale = load_half(scales);
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) {
    const uint8_t* head = x + r * stride;
    I sum = line_at((const uint8_t*)(sums + kLanes * r));
    if constexpr (FORMAT != kQ8_0 && FORMAT != kQ4_1) sum = add32(sum, all32(head_of(head).correction));
    acc[r] = fma(floats_of(sum), scale * set1(head_of(head).scale), acc[r]);
    if constexpr (FORMAT == kQ4_1) {
      float shift;
      memcpy(&shift, head + offsetof(BlockHead, correction), sizeof shift);
      acc[r] = fma(load_half(scales + 32), set1(shift), acc[r]);
    }
  }
}

// y += `blocks` blocks of 16 rows times a panel whose bytes are at `lines`. A block is scaled while the next is summed.
// `ahead`: distance in bytes to the lines that are prefetched; 0 where unpacking has read the lines already.
template <int FORMAT>
static void byte_tile(const uint8_t* x, int64_t stride, const uint8_t* lines, const uint8_t* scales, int blocks,
                      bool first, float* y, int64_t y_stride, int64_t ahead) {
  alignas(64) int32_t sums[2][kTile * kLanes];
  V acc[kTile];
  const int64_t block_bytes = x_block_bytes(FORMAT);
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) acc[r] = first ? zero() : load(y + r * y_stride);
  TF_BYTE_STEP(0, 0);
  for (int b = 0; b < blocks; b += 2) {
    if (ahead)
      for (int i = 0; i < 16; ++i) __builtin_prefetch(lines + 512 * b + 64 * i + ahead, 0, 2);
    if (b + 1 < blocks) TF_BYTE_STEP(1, b + 1);
    add_block<FORMAT>(acc, sums[0], x + b * block_bytes, stride, scales + b * scale_bytes(FORMAT));
    if (b + 2 < blocks) TF_BYTE_STEP(0, b + 2);
    if (b + 1 < blocks)
      add_block<FORMAT>(acc, sums[1], x + (b + 1) * block_bytes, stride, scales + (b + 1) * scale_bytes(FORMAT));
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTile; ++r) store(y + r * y_stride, acc[r]);
}
#undef TF_BYTE_STEP

// `quant_product` with 16 rows at a time. Writes whole tiles of y, beyond `rows` too. `first`: as above.
template <int FORMAT>
static void byte_tile_product(int rows, int panels, const uint8_t* x, int64_t stride, const uint8_t* panel,
                              int64_t panel_bytes, int64_t blocks, float* y, int64_t y_stride, bool first) {
  alignas(64) uint8_t unpacked[FORMAT == kQ8_0 ? 64 : 512 * kUnpackedBlocks];
  const int64_t each = FORMAT == kQ8_0 ? blocks : kUnpackedBlocks;
  for (int p = 0; p < panels; ++p) {
    const uint8_t* lines = panel + p * panel_bytes;
    const uint8_t* scales = lines + blocks * lines_of(FORMAT) * 64;
    for (int64_t block = 0; block < blocks; block += each) {
      const int count = (int)(blocks - block < each ? blocks - block : each);
      const uint8_t* bytes = lines + block * lines_of(FORMAT) * 64;
      if constexpr (FORMAT != kQ8_0) {
        unpack_blocks<FORMAT>(bytes, count, unpacked);
        bytes = unpacked;
      }
      TF_WRITTEN();
      for (int r = 0; r < rows; r += kTile)
        byte_tile<FORMAT>(x + r * stride + block * x_block_bytes(FORMAT), stride, bytes,
                          scales + block * scale_bytes(FORMAT), count, block == 0, y + r * y_stride + kLanes * p, y_stride,
                          FORMAT == kQ8_0 && first && r == 0 ? panels * panel_bytes : 0);
    }
  }
}

// Rows r .. r + rows of `tiled` products with the unit of panels at `panel`.
static void tile_product(const LinearCall* c, int r, int rows, int panels, const uint8_t* panel, float* y,
                         int64_t y_stride) {
  const int64_t stride = c->quantised_stride, bytes = c->w.panel_bytes, blocks = c->w.inputs / kBlock;
  const uint8_t* x = c->quantised_x + r * stride;
  const int32_t format = c->w.format;
  if (format == kBF16) pair_tile_product(rows, panels, x, stride, panel, bytes, y, y_stride, r == 0);
  else if (format == kQ8_0) byte_tile_product<kQ8_0>(rows, panels, x, stride, panel, bytes, blocks, y, y_stride, r == 0);
  else if (format == kQ4_0) byte_tile_product<kQ4_0>(rows, panels, x, stride, panel, bytes, blocks, y, y_stride, r == 0);
  else if (format == kQ4_1) byte_tile_product<kQ4_1>(rows, panels, x, stride, panel, bytes, blocks, y, y_stride, r == 0);
  else byte_tile_product<kQ5_0>(rows, panels, x, stride, panel, bytes, blocks, y, y_stride, r == 0);
}

#undef TF_WRITTEN

}  // namespace
}  // namespace truffula

#endif
