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

// Example indices by rank, by pack: every rank has the same number of packs, some maybe empty.
using Plan = std::vector<std::vector<std::vector<std::int64_t>>>;

// What a token, a pair of query and key, and a row cost, in any unit.
struct Prices {
  double token, pair, row;
};

// E examples of one stream or several, borrowed and measured. A stream is a token sequence that the
// model reads by itself; the streams of an example stay together.
//
// A pack is cut into segments. A segment's tokens are the queries of one attention call; its keys
// are all tokens of its stream so far. Where prefixes are shared, the prompt of an example, which
// is what its streams begin with alike, lies in the pack once, as a segment of its own before those
// of the streams. It ends before the first trained token of any of them and leaves each a token.
// Examples of the same prompt that follow one another in a pack share it too.
class Ragged {
 public:
  // `counts` has how many of the streams each example takes, `weights` the weight of each. Throws
  // InvalidInput for counts that do not add up, mask and tokens of different length, an empty
  // sequence, or a trained first token, which nothing predicts.
  Ragged(std::vector<SequenceView> streams, const std::vector<std::int64_t>& counts,
         std::vector<float> weights, bool share_prefixes);

  // Of each example alone in a pack: tokens, rows, and pairs of query and key, which are what
  // attention computes.
  const std::vector<std::int64_t>& tokens() const { return tokens_; }
  const std::vector<std::int64_t>& rows() const { return rows_; }
  const std::vector<double>& pairs() const { return pairs_; }

  // Spreads the examples over the ranks, as the function of this name does, examples of the same
  // prompt together as far as that takes no more steps and keeps all ranks busy.
  Plan plan(std::int64_t budget, std::int64_t ranks, const Prices& prices) const;

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
  std::size_t measured_prompt(std::size_t example) const;
  std::size_t streams_of(std::size_t example) const {
    return first_[example + 1] - first_[example];
  }

  // What is planned as one: examples of one prompt, with what they take in a pack.
  struct Units {
    std::vector<std::vector<std::int64_t>> examples;
    std::vector<std::int64_t> lengths;
    std::vector<double> costs;
  };
  // Groups cut into units of at most `budget` tokens, of which at most `most` follow the prompt, or
  // of one example.
  Units units(const std::vector<std::vector<std::int64_t>>& groups, std::int64_t budget,
              std::int64_t most, const Prices& prices) const;

  template <typename Visit>
  void each_run(const std::vector<std::int64_t>& examples, Visit visit) const;

  std::vector<SequenceView> streams_;
  std::vector<std::size_t> first_;   // [E+1], the streams of example e are [first[e], first[e+1])
  std::vector<std::size_t> prompt_;  // [E], tokens that its streams may share, 0 where they may not
  std::vector<std::size_t> group_;   // [E], the first example of the same prompt
  std::vector<std::size_t> stream_rows_;  // [S], trained tokens
  std::vector<std::int64_t> tokens_;      // [E]
  std::vector<std::int64_t> rows_;        // [E]
  std::vector<double> pairs_;             // [E]
  std::vector<float> weights_;            // [E]
};

// Spreads examples of lengths[i] tokens, which cost costs[i] each, over the ranks in packs of at
// most `budget` tokens; a longer example gets a pack of its own. Packs that run at the same time
// exchange single examples until their costs are even, as far as the budget allows. A function of
// its arguments alone, so ranks that call it alike agree without a message, and so does a run that
// is resumed.
Plan plan(const std::vector<std::int64_t>& lengths, const std::vector<double>& costs,
          std::int64_t budget, std::int64_t ranks);

}  // namespace fastalign
