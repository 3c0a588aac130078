// Numpy arrays from Python, checked before a pointer into them is kept, and new arrays for Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "executable.h"
#include "sampler_slots.h"

namespace truffula {

namespace nb = nanobind;

template <class T>
using In = nb::ndarray<const T, nb::numpy, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::numpy>;
using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

// Columns are (buffer, start, width), or None.
Ref ref_of(const nb::object& columns);

// The storage format called `name` (kFormats).
int32_t format_named(const std::string& name);

// A matrix [rows, inputs] of float32, float16, or uint16 (bfloat16's bits).
Source source_of(const AnyArray& array);

// Blocks [rows, blocks, bytes] of a stored type, as GGUF names it.
Source blocks_of(const AnyArray& array, const std::string& kind);

// References to the arrays that steps read, by name: they keep the memory alive while C++ has pointers to it.
using HeldArrays = std::vector<std::pair<const char*, nb::object>>;

// An array that steps read, with at least `count` elements. Never converted: a copy would not show later changes.
template <class T>
const T* step_array(HeldArrays& held, const nb::object& owner, const char* name, int64_t count) {
  const nb::object object = owner.attr(name);
  In<T> array;
  if (!nb::try_cast(object, array, false))
    throw std::invalid_argument(std::string(name) + ": expected a contiguous array of another dtype");
  if (static_cast<int64_t>(array.size()) < count) throw std::invalid_argument(std::string(name) + ": too small");
  held.emplace_back(name, object);
  return array.data();
}

StepArrays step_arrays(HeldArrays& held, const nb::object& inputs, const Capacity& c, int64_t groups);

// A copy of `rows` rows of `width` floats, `stride` floats apart.
Out<float> floats(const float* from, size_t rows, size_t width, int64_t stride);

// Zeros [rows, width], of one axis where the width is 1.
template <class T>
Out<T> made(size_t rows, size_t width) {
  auto* data = new T[rows * width + 1]();
  const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return width == 1 ? Out<T>(data, {rows}, owner) : Out<T>(data, {rows, width}, owner);
}

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

}  // namespace truffula
