// Ragged token sequences to one flat batch, and examples to micro-batches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fastalign {

// One token sequence, borrowed from the caller: `length` tokens and as many mask bytes, where any
// byte but 0 means that the token is trained on.
struct SequenceView {
  const std::int32_t* input_ids;
  std::size_t length;
  const std::uint8_t* loss_mask;
  std::size_t mask_length;
};

// S sequences laid end to end: T tokens, of which M positions predict a target.
struct PackedBatch {
  std::vector<std::int64_t> input_ids;   // [T]
  std::vector<std::int64_t> positions;   // [T], from 0 in every sequence
  std::vector<std::int32_t> cu_seqlens;  // [S+1], sequence s is [cu_seqlens[s], cu_seqlens[s+1])
  std::vector<std::int64_t> rows;        // [M], flat positions whose next token is trained on
  std::vector<std::int64_t> targets;     // [M], that next token
  std::vector<std::int32_t> cu_rows;     // [S+1], the rows of sequence s, as cu_seqlens
};

// Packs the sequences in the order given. Throws InvalidInput for lengths that differ, an empty
// sequence, a trained first token (nothing predicts it), a negative token id, or more than 2^31-1
// tokens in all.
PackedBatch pack(const std::vector<SequenceView>& sequences);

// Example indices by rank, by pack: every rank has the same number of packs, some maybe empty.
using Plan = std::vector<std::vector<std::vector<std::int64_t>>>;

// Spreads `count` examples of lengths[i] tokens over the ranks, in packs of at most `budget`
// tokens; a longer example gets a pack of its own. A function of its arguments alone, so ranks
// that call it with the same lengths agree without a message.
Plan plan(const std::int64_t* lengths, std::size_t count, std::int64_t budget, std::int64_t ranks);

}  // namespace fastalign
