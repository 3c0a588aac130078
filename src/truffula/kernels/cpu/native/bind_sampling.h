// The binding of the sampler: SampleInputs and SequenceSampling of kernels/inputs.py as C++ has them.
#pragma once

#include <memory>

#include "arrays.h"
#include "sampler_slots.h"

namespace truffula {

// The arrays of SampleInputs (see kernels/inputs.py) for `rows` rows of `vocab` ids, checked for their length.
SampleArgs sample_args(HeldArrays& held, const nb::object& samples, int64_t rows, int64_t vocab);

// A sequence from Python: its tokens, and its SequenceSampling (see kernels/inputs.py).
std::unique_ptr<SequenceState> sequence_state(const In<int32_t>& prompt, const In<int32_t>& completion,
                                              const nb::object& sampling, int64_t vocab);

// (ids, logprob, finite, top_ids, top_logprobs) of `rows` rows, the last two flat: [rows * width]. `fill` writes them
// without the GIL: the caller counts as a call in flight.
template <class F>
nb::tuple sampled(int64_t rows, int32_t width, const F& fill) {
  const auto count = static_cast<size_t>(rows);
  const auto ids = made<int32_t>(count, 1);
  const auto logprob = made<float>(count, 1);
  const auto finite = made<uint8_t>(count, 1);
  const auto top_ids = made<int32_t>(count * static_cast<size_t>(width), 1);
  const auto top_logprobs = made<float>(count * static_cast<size_t>(width), 1);
  const SampleOut out{ids.data(), logprob.data(), finite.data(), top_ids.data(), top_logprobs.data(), width};
  {
    const nb::gil_scoped_release release;
    fill(out);
  }
  return nb::make_tuple(ids, logprob, finite, top_ids, top_logprobs);
}

// For tests: the sampler on its own.
void bind_sampler(nb::module_& m);

}  // namespace truffula
