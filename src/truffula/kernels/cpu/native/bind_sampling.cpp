#include "bind_sampling.h"

#include <nanobind/stl/string.h>

#include <span>
#include <type_traits>

#include "calls.h"
#include "dispatch.h"

namespace truffula {

using namespace nb::literals;

namespace {

template <class T>
std::vector<T> numbers(const nb::object& owner, const char* name) {
  In<T> array;
  if (!nb::try_cast(owner.attr(name), array, false) || array.ndim() != 1)
    throw std::invalid_argument(std::string(name) + ": expected a contiguous array of another dtype");
  return {array.data(), array.data() + array.size()};
}

// A sampler for the caller's logits, with the loops of one instruction set.
struct StandaloneSampler {
  StandaloneSampler(const std::string& isa, int32_t slots, int64_t vocab) : sampler(checked(vocab), checked_slots(slots)) {
    scratch.loops = find_table(isa)->sampling;
  }

  static int64_t checked(int64_t vocab) {
    if (vocab < 1 || vocab > INT32_MAX) throw std::invalid_argument("vocab: not between 1 and 2^31");
    return vocab;
  }
  static int32_t checked_slots(int32_t slots) {
    if (slots < 1 || slots > 1 << 24) throw std::invalid_argument("slots: not between 1 and 2^24");
    return slots;
  }

  void set_sequence(int32_t slot, const In<int32_t>& prompt, const In<int32_t>& completion, const nb::object& sampling) {
    sampler.set_sequence(slot, sequence_state(prompt, completion, sampling, sampler.vocab()));
  }

  nb::tuple sample(const In<float>& logits, const nb::object& samples) {
    if (logits.ndim() != 2 || static_cast<int64_t>(logits.shape(1)) != sampler.vocab())
      throw std::invalid_argument("logits: not [rows, vocab]");
    const auto rows = static_cast<int64_t>(logits.shape(0));
    HeldArrays held;
    const SampleArgs args = sample_args(held, samples, rows, sampler.vocab());
    sampler.begin(rows, args);
    const InFlightCall call;
    return sampled(rows, sampler.width(rows, args), [&](const SampleOut& out) {
      for (int64_t r = 0; r < rows; ++r) sampler.sample(logits.data() + r * sampler.vocab(), r, args, out, scratch);
    });
  }

  Sampler sampler;
  SampleScratch scratch;
};

}  // namespace

SampleArgs sample_args(HeldArrays& held, const nb::object& samples, int64_t rows, int64_t vocab) {
  SampleArgs args{};
  args.row_slot = step_array<int32_t>(held, samples, "row_slot", rows);
  args.target = step_array<int32_t>(held, samples, "target", rows);
  args.draw = step_array<uint32_t>(held, samples, "draw", rows);
  args.mask_row = step_array<int32_t>(held, samples, "mask_row", rows);
  const nb::object masks = samples.attr("mask");
  args.masks = static_cast<int64_t>(nb::len(masks));
  args.mask = step_array<uint32_t>(held, samples, "mask", args.masks * mask_words(vocab));
  return args;
}

std::unique_ptr<SequenceState> sequence_state(const In<int32_t>& prompt, const In<int32_t>& completion,
                                              const nb::object& sampling, int64_t vocab) {
  SequenceSampling s;
  const auto read = [&](auto& into, const char* name) {
    into = nb::cast<std::decay_t<decltype(into)>>(sampling.attr(name));
  };
  read(s.temperature, "temperature"), read(s.top_k, "top_k"), read(s.top_p, "top_p"), read(s.min_p, "min_p");
  read(s.typical_p, "typical_p"), read(s.repetition, "repetition"), read(s.frequency, "frequency");
  read(s.presence, "presence"), read(s.n_logprobs, "n_logprobs"), read(s.n_prompt_logprobs, "n_prompt_logprobs");
  read(s.seed, "seed"), read(s.choice, "choice"), read(s.warped, "warped"), read(s.min_tokens, "min_tokens");
  s.bias_ids = numbers<int32_t>(sampling, "bias_ids");
  s.bias_values = numbers<float>(sampling, "bias_values");
  s.banned_ids = numbers<int32_t>(sampling, "banned_ids");
  return std::make_unique<SequenceState>(std::move(s), std::span(prompt.data(), prompt.size()),
                                         std::span(completion.data(), completion.size()), vocab);
}

void bind_sampler(nb::module_& m) {
  nb::class_<StandaloneSampler>(m, "Sampler", "The sampler on its own: what an Executable's step draws, of the caller's logits.")
      .def(nb::init<const std::string&, int32_t, int64_t>(), "isa"_a, "slots"_a, "vocab"_a)
      .def("set_sequence", &StandaloneSampler::set_sequence, "slot"_a, "prompt_ids"_a.noconvert(),
           "completion_ids"_a.noconvert(), "sampling"_a)
      .def("sample", &StandaloneSampler::sample, "logits"_a.noconvert(), "samples"_a);
}

}  // namespace truffula
