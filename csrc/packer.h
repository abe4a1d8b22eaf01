// Ragged token sequences to flat packs, and examples to packs and ranks.
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

// How long the arrays of a pack are.
struct Sizes {
  std::size_t records = 0;   // R
  std::size_t streams = 0;   // S
  std::size_t segments = 0;  // G, S where nothing is shared
  std::size_t tokens = 0;    // T
  std::size_t keys = 0;      // K, T where nothing is shared
  std::size_t rows = 0;      // M
};

// Where one array of a pack lies in its memory.
struct Field {
  const char* name;
  const char* dtype;
  std::size_t offset;  // in bytes
  std::size_t count;   // of elements
  std::size_t itemsize;
};

struct Layout {
  std::vector<Field> fields;
  std::size_t bytes;
};

// The arrays of a pack of these sizes, in one block of memory.
Layout layout(const Sizes& sizes);

// E examples of one stream or several, borrowed and measured. A stream is a token sequence that the
// model reads by itself; the streams of an example stay together.
//
// A pack is cut into segments. A segment's tokens are the queries of one attention call; its keys
// are all tokens of its stream so far. Where prefixes are shared, the longest common prefix of an
// example's streams lies in the pack once, as a segment of its own before those of the streams. It
// ends before the first trained token of any of them and leaves each a token.
class Ragged {
 public:
  // `counts` has how many of the streams each example takes, `weights` the weight of each. Throws
  // InvalidInput for counts that do not add up, mask and tokens of different length, an empty
  // sequence, or a trained first token, which nothing predicts.
  Ragged(std::vector<SequenceView> streams, const std::vector<std::int64_t>& counts,
         std::vector<float> weights, bool share_prefixes);

  // Of each example in a pack: tokens, rows, and pairs of query and key, which are what attention
  // computes.
  const std::vector<std::int64_t>& tokens() const { return tokens_; }
  const std::vector<std::int64_t>& rows() const { return rows_; }
  const std::vector<double>& pairs() const { return pairs_; }

  // Of a pack of these examples. Throws InvalidInput for an index out of range, or for more tokens
  // or keys than int32 offsets count.
  Sizes sizes(const std::vector<std::int64_t>& examples) const;

  // Writes a pack of these examples into memory as layout() has it. The sequences belong to the
  // caller, who may change them at any time: nothing is written beside the arrays then either.
  // Throws InvalidInput for memory of another size or not aligned to 8 bytes, a negative token id,
  // or a mask that is not the one that was measured.
  void fill(const std::vector<std::int64_t>& examples, unsigned char* memory,
            std::size_t bytes) const;

 private:
  std::size_t checked(const std::vector<std::int64_t>& examples, std::size_t position) const;
  std::size_t shared_prefix(std::size_t example) const;

  std::vector<SequenceView> streams_;
  std::vector<std::size_t> first_;   // [E+1], the streams of example e are [first[e], first[e+1])
  std::vector<std::size_t> prefix_;  // [E], tokens that its streams share
  std::vector<std::size_t> stream_rows_;  // [S], trained tokens
  std::vector<std::int64_t> tokens_;      // [E]
  std::vector<std::int64_t> rows_;        // [E]
  std::vector<double> pairs_;             // [E]
  std::vector<float> weights_;            // [E]
};

// Example indices by rank, by pack: every rank has the same number of packs, some maybe empty.
using Plan = std::vector<std::vector<std::vector<std::int64_t>>>;

// Spreads examples of lengths[i] tokens, which cost costs[i] each, over the ranks in packs of at
// most `budget` tokens; a longer example gets a pack of its own. Packs that run at the same time
// exchange single examples until their costs are even, as far as the budget allows. A function of
// its arguments alone, so ranks that call it alike agree without a message, and so does a run that
// is resumed.
Plan plan(const std::vector<std::int64_t>& lengths, const std::vector<double>& costs,
          std::int64_t budget, std::int64_t ranks);

}  // namespace fastalign
