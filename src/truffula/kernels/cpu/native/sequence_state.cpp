#include "sequence_state.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace truffula {

SequenceState::SequenceState(SequenceSampling asked, std::span<const std::int32_t> prompt,
                             std::span<const std::int32_t> completion, std::int64_t vocab)
    : sampling(std::move(asked)) {
  if (sampling.width < 0 || sampling.width > vocab) throw std::invalid_argument("width: outside the vocabulary");
  const std::int64_t width = sampling.width ? sampling.width : vocab;
  const auto known = [width](std::int32_t id) { return id >= 0 && id < width; };
  for (const std::span<const std::int32_t> ids : {prompt, completion, std::span<const std::int32_t>(sampling.bias_ids),
                                                  std::span<const std::int32_t>(sampling.banned_ids)})
    if (!std::all_of(ids.begin(), ids.end(), known))
      throw std::invalid_argument("an id of the sequence is outside the vocabulary");
  if (sampling.bias_ids.size() != sampling.bias_values.size())
    throw std::invalid_argument("bias_values: not one for each of bias_ids");
  if (!sampling.penalised()) return;
  std::vector<std::int32_t> place_of(static_cast<std::size_t>(width), -1);
  const auto see = [&](std::int32_t id, std::int32_t more) {
    std::int32_t& place = place_of[static_cast<std::size_t>(id)];
    if (place < 0) {
      place = static_cast<std::int32_t>(ids_.size());
      ids_.push_back(id);
      counts_.push_back(0);
    }
    counts_[static_cast<std::size_t>(place)] += more;
  };
  for (const std::int32_t id : prompt) see(id, 0);
  prompt_ids_ = ids_.size();
  for (const std::int32_t id : completion) see(id, 1);
  completion_.assign(completion.begin(), completion.end());
}

void SequenceState::rewind(std::uint32_t draw) {
  if (!sampling.penalised()) return;
  while (completion_.size() > draw) {
    const auto place = static_cast<std::size_t>(std::find(ids_.begin(), ids_.end(), completion_.back()) - ids_.begin());
    completion_.pop_back();
    // Ids are in order of first appearance, so an id whose count returns to 0 is the last.
    if (--counts_[place] == 0 && place >= prompt_ids_) {
      ids_.pop_back();
      counts_.pop_back();
    }
  }
  const auto make_room = [](std::vector<std::int32_t>& of) {
    if (of.size() == of.capacity()) of.reserve(2 * of.size() + 16);
  };
  make_room(ids_);
  make_room(counts_);
  make_room(completion_);
}

void SequenceState::count(std::int32_t id) noexcept {
  if (!sampling.penalised()) return;
  const auto place = static_cast<std::size_t>(std::find(ids_.begin(), ids_.end(), id) - ids_.begin());
  if (place == ids_.size()) {
    ids_.push_back(id);
    counts_.push_back(0);
  }
  ++counts_[place];
  completion_.push_back(id);
}

}  // namespace truffula
