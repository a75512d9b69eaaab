// Sizes of tiles. Written by `python -m bench tune`, which timed the values in each comment, relative to the one taken,
// on amd-epyc-2-threads-avx512-bf16.
#pragma once

#include <cstdint>

namespace dlm::tiles {

// Attention: keys of a tile. 96: 1.02, 144: 1.01, 192: 1.00, 288: 0.99.
constexpr int64_t kAttentionKeys = 192;
// Attention: panels of query rows that share a tile of keys. 4: 1.01, 8: 1.00, 12: 1.00.
constexpr int64_t kAttentionPanels = 8;
// Its gradient: query rows of a tile. 48: 1.04, 96: 1.00, 144: 0.98.
constexpr int64_t kBackwardRows = 96;
// Its gradient: keys of a tile. 64: 1.04, 128: 1.00, 192: 1.00.
constexpr int64_t kBackwardKeys = 128;
// LM head: rows of a block. 96: 1.02, 192: 1.00, 288: 0.99.
constexpr int64_t kHeadRows = 192;
// LM head: tokens of a tile. 64: 1.00, 128: 1.00, 256: 1.00.
constexpr int64_t kHeadColumns = 128;
// LM head: elements along the width, at once. 64: 1.24, 128: 1.08, 256: 1.03, 512: 1.00.
constexpr int64_t kHeadDepth = 512;
// Scores: logits of a row that one sum goes through. 4096: 1.44, 16384: 1.09, 65536: 1.00, 131072: 1.00.
constexpr int64_t kScorePiece = 65536;

}  // namespace dlm::tiles
