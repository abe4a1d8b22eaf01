// Finds stop strings in the text of rows that grow by a token at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace fastalign {

// The bytes that each token of a vocabulary decodes to.
struct TokenBytes {
  std::vector<std::string> by_id;
};

// Matches bytes, so a stop string may begin and end inside tokens, and a character may be spread
// over several. Of each row only so many bytes are kept as a match could still begin in.
class StopMatcher {
 public:
  // Throws InvalidInput for an empty stop string.
  StopMatcher(std::shared_ptr<const TokenBytes> tokens, std::vector<std::string> stop,
              std::size_t rows);

  // Appends token_ids[i] to row rows[i], for i below `count`, and writes to ended[i] whether a stop
  // string ends in that token. Ids beyond the table have no text.
  //
  // Throws InvalidInput for a row that there is not or a negative id; the rows before have grown.
  void push(const std::int64_t* rows, const std::int32_t* token_ids, std::size_t count,
            bool* ended);

 private:
  bool push(std::string* tail, const std::string& bytes) const;

  std::shared_ptr<const TokenBytes> tokens_;
  std::vector<std::string> stop_;
  std::size_t longest_ = 0;
  std::vector<std::string> tails_;
};

}  // namespace fastalign
