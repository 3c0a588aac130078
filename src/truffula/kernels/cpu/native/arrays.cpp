#include "arrays.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <span>
#include <type_traits>

namespace truffula {

Ref ref_of(const nb::object& columns) {
  if (columns.is_none()) return {};
  nb::tuple t;
  Ref ref;
  if (!nb::try_cast(columns, t) || t.size() != 3 || !nb::try_cast(t[0], ref.buffer) || !nb::try_cast(t[1], ref.start) ||
      !nb::try_cast(t[2], ref.width))
    throw std::invalid_argument("columns are (buffer, start, width), each below 2^31");
  return ref;
}

int32_t format_named(const std::string& name) {
  const auto found = std::find(std::begin(kFormats), std::end(kFormats), name);
  if (found == std::end(kFormats)) throw std::invalid_argument("there is no format " + name);
  return static_cast<int32_t>(found - kFormats);
}

Source source_of(const AnyArray& array) {
  if (array.ndim() != 2) throw std::invalid_argument("a matrix has two axes");
  Source source{array.data(), Stored::kFloat32, static_cast<int64_t>(array.shape(1))};
  if (array.dtype() == nb::dtype<uint16_t>()) source.type = Stored::kBfloat16;
  else if (array.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && array.dtype().bits == 16)
    source.type = Stored::kFloat16;
  else if (array.dtype() != nb::dtype<float>()) throw std::invalid_argument("a matrix holds float32, float16 or uint16");
  return source;
}

Source blocks_of(const AnyArray& array, const std::string& kind) {
  if (array.ndim() != 3 || array.dtype() != nb::dtype<uint8_t>()) throw std::invalid_argument("blocks have three axes of uint8");
  const std::pair<const char*, Stored> kinds[] = {
      {"Q8_0", Stored::kQ8_0}, {"Q4_0", Stored::kQ4_0}, {"Q4_1", Stored::kQ4_1}, {"Q5_0", Stored::kQ5_0},
      {"FP8_128", Stored::kFP8_128}, {"FP8_32", Stored::kFP8_32}, {"NF4", Stored::kNF4}, {"FP4_16", Stored::kFP4_16}};
  for (const auto& [name, type] : kinds)
    if (kind == name) {
      if (static_cast<int64_t>(array.shape(2)) != stored_block_bytes(type)) throw std::invalid_argument(kind + ": bad blocks");
      return {array.data(), type, static_cast<int64_t>(array.shape(1)) * stored_block_inputs(type)};
    }
  throw std::invalid_argument("blocks of " + kind + " are not packed");
}

StepArrays step_arrays(HeldArrays& held, const nb::object& inputs, const Capacity& c, int64_t groups) {
  const int64_t T = c.max_tokens, N = c.max_seqs, G = c.max_segments;
  return {step_array<int32_t>(held, inputs, "token_ids", T),
          step_array<int32_t>(held, inputs, "position", T),
          step_array<int32_t>(held, inputs, "rope_pos", 3 * T),
          step_array<int32_t>(held, inputs, "rope_length", T),
          step_array<int32_t>(held, inputs, "slot_mapping", groups * T),
          step_array<int32_t>(held, inputs, "block_tables", groups * N * c.max_blocks_per_seq),
          step_array<int32_t>(held, inputs, "q_start", N + 1),
          step_array<int32_t>(held, inputs, "kv_len", N),
          step_array<int32_t>(held, inputs, "seg", 3 * G),
          step_array<int32_t>(held, inputs, "seg_r", 2 * G),
          step_array<float>(held, inputs, "seg_weight", G),
          step_array<int32_t>(held, inputs, "logit_rows", c.max_logit_rows),
          step_array<int32_t>(held, inputs, "span_start", c.max_spans() + 1),
          step_array<int32_t>(held, inputs, "state_in", c.max_spans()),
          step_array<int32_t>(held, inputs, "state_out", c.max_spans())};
}

Out<float> floats(const float* from, size_t rows, size_t width, int64_t stride) {
  auto* data = new float[rows * width + 1];
  for (size_t r = 0; r < rows; ++r)
    std::memcpy(data + r * width, from + static_cast<int64_t>(r) * stride, width * sizeof(float));
  const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return Out<float>(data, {rows, width}, owner);
}

namespace {

template <class T>
std::vector<T> numbers(const nb::object& owner, const char* name) {
  In<T> array;
  if (!nb::try_cast(owner.attr(name), array, false) || array.ndim() != 1)
    throw std::invalid_argument(std::string(name) + ": expected a contiguous array of another dtype");
  return {array.data(), array.data() + array.size()};
}

}  // namespace

SampleArgs sample_args(HeldArrays& held, const nb::object& samples, int64_t rows, int64_t vocab) {
  SampleArgs args{};
  args.row_slot = step_array<int32_t>(held, samples, "row_slot", rows);
  args.target = step_array<int32_t>(held, samples, "target", rows);
  args.draw = step_array<uint32_t>(held, samples, "draw", rows);
  args.mask_row = step_array<int32_t>(held, samples, "mask_row", rows);
  const nb::object masks = samples.attr("mask");
  args.masks = static_cast<int64_t>(nb::len(masks));
  args.words = mask_words(vocab);
  args.mask = step_array<uint32_t>(held, samples, "mask", args.masks * args.words);
  return args;
}

std::unique_ptr<SequenceState> sequence_state(const In<int32_t>& prompt, const In<int32_t>& completion,
                                              const nb::object& sampling, int64_t vocab) {
  SequenceSampling s;
  const auto read = [&](auto& into, const char* name) {
    into = nb::cast<std::decay_t<decltype(into)>>(sampling.attr(name));
  };
  read(s.temperature, "temperature"), read(s.top_k, "top_k"), read(s.width, "width"), read(s.top_p, "top_p"), read(s.min_p, "min_p");
  read(s.typical_p, "typical_p"), read(s.repetition, "repetition"), read(s.frequency, "frequency");
  read(s.presence, "presence"), read(s.n_logprobs, "n_logprobs"), read(s.n_prompt_logprobs, "n_prompt_logprobs");
  read(s.seed, "seed"), read(s.choice, "choice"), read(s.warped, "warped"), read(s.min_tokens, "min_tokens");
  s.bias_ids = numbers<int32_t>(sampling, "bias_ids");
  s.bias_values = numbers<float>(sampling, "bias_values");
  s.banned_ids = numbers<int32_t>(sampling, "banned_ids");
  return std::make_unique<SequenceState>(std::move(s), std::span(prompt.data(), prompt.size()),
                                         std::span(completion.data(), completion.size()), vocab);
}

}  // namespace truffula
