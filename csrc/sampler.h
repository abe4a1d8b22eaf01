// Draws one token for each row of logits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastalign {

enum class LogitsType { kFloat32, kBfloat16 };

// B rows of V logits, borrowed from the caller; rows are `row_stride` elements apart.
struct LogitsView {
  const void* data;
  LogitsType type;
  std::size_t rows;
  std::size_t vocab_size;
  std::ptrdiff_t row_stride;
};

// The order of truncations is vLLM's: the temperature divides the logits; min-p drops tokens whose
// probability is below min_p times the largest; top-k keeps the k most probable of the rest; top-p
// the fewest most probable of those whose probabilities, after top-k, sum to at least top_p. Equal
// logits rank by token id, the lower one first, so exactly k tokens are left by top-k.
struct SamplingRule {
  double temperature = 1.0;  // 0 takes the first of the largest logits
  std::int64_t top_k = 0;    // off where it is below 1 or not below V
  double top_p = 1.0;
  double min_p = 0.0;
};

// What was drawn for each of B rows.
struct Draws {
  std::int32_t* token_ids;
  float* logprobs;           // under the softmax of the logits as they are
  float* sampling_logprobs;  // under the distribution that the token was drawn from
};

enum class Isa { kPortable, kAvx2, kAvx512 };

const char* isa_name(Isa isa);

// What runs on this machine, the fastest last.
std::vector<Isa> supported_isas();

// Draws row b with the random number of seeds[b] and positions[b] alone, on up to `threads` threads
// (fewer where that is faster), the caller's among them. Equal bits of a row, seed, position and
// rule give equal results, whatever the other rows, the number of threads, the instruction set and
// the machine.
//
// Throws InvalidInput for a rule that cannot be, an instruction set that this machine lacks, no
// tokens or more than int32 counts, and for a row that holds NaN or +infinity or nothing but
// -infinity: the first such row is named, and what the others got is unspecified.
void sample(const LogitsView& logits, const std::uint64_t* seeds, const std::uint64_t* positions,
            const SamplingRule& rule, std::size_t threads, Isa isa, const Draws& draws);

}  // namespace fastalign
