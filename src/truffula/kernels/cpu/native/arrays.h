// Numpy arrays from Python, checked before a pointer into them is kept, and new arrays for Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "executable.h"

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

}  // namespace truffula
