// The Python binding. Arrays are checked (arrays.h); computations run without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <stdexcept>
#include <utility>

#include "arrays.h"
#include "calls.h"
#include "dispatch.h"
#include "executable.h"
#include "tables.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace truffula {
namespace {

// The Python object: the executable, and references to the arrays that it reads.
struct Native {
  Native(const std::string& isa, int threads, const nb::object& capacity, const std::string& kv_format, int32_t groups,
         bool debug)
      : cap{field(capacity, "max_tokens"), field(capacity, "max_seqs"), field(capacity, "max_logit_rows"),
            field(capacity, "max_segments"), field(capacity, "num_blocks"), field(capacity, "block_size"),
            field(capacity, "max_blocks_per_seq"), field(capacity, "num_states")},
        num_groups(groups),
        executable(isa, threads, cap, format_named(kv_format), groups, debug) {}

  static int32_t field(const nb::object& capacity, const char* name) { return nb::cast<int32_t>(capacity.attr(name)); }

  // Every access to the executable holds one of these. A second call from another thread raises RuntimeError.
  class CallGuard {
   public:
    explicit CallGuard(Native& native) : native_(native) {
      int64_t holder = 0;
      const int64_t here = process_id();
      // In a forked child a call of a thread that exists in the parent only counts as ended.
      if (!native_.process_in_call.compare_exchange_strong(holder, here) &&
          (holder == here || !native_.process_in_call.compare_exchange_strong(holder, here)))
        throw std::runtime_error("another thread is in this executable; it takes one call at a time");
    }
    ~CallGuard() { native_.process_in_call.store(0); }
    CallGuard(const CallGuard&) = delete;
    CallGuard& operator=(const CallGuard&) = delete;
    Executable* operator->() const { return &native_.executable; }

   private:
    const InFlightCall call_;
    Native& native_;
  };
  CallGuard enter() { return CallGuard(*this); }

  Capacity cap;
  int32_t num_groups;
  Executable executable;
  std::atomic<int64_t> process_in_call{0};  // the process whose thread is in a call; 0: none
  nb::object inputs;
  HeldArrays held;
  std::map<int32_t, nb::object> images;  // the data of adapters, by slot
};

void seal(Native& self, const nb::object& inputs, int64_t arena_floats, int32_t logits_buffer, int64_t vocab, int64_t planned_width) {
  HeldArrays held;
  const StepArrays arrays = step_arrays(held, inputs, self.cap, self.num_groups);
  self.enter()->seal(arrays, arena_floats, logits_buffer, vocab, planned_width);
  self.inputs = inputs;
  self.held = std::move(held);
}

void run(Native& self) {
  if (!self.inputs.is_valid()) throw std::invalid_argument("the program is not sealed");
  for (const auto& [name, object] : self.held)
    if (!self.inputs.attr(name).is(object))
      throw std::invalid_argument(std::string(name) + " is another array than at load; fill that array instead");
  const auto count = [&](const char* name) { return nb::cast<int32_t>(self.inputs.attr(name)); };
  const StepCounts counts{count("T"), count("N"), count("R"), count("G"), count("Z")};
  const auto entered = self.enter();
  const nb::gil_scoped_release release;
  entered->run(counts);
}

// Returns the sums of squares of the values and of the errors of rounding them to a quantised format.
nb::tuple fill(Native& self, int32_t weight, const AnyArray& array, int64_t first, const std::string& kind, int64_t expert) {
  const Source source = kind.empty() ? source_of(array) : blocks_of(array, kind);
  const auto rows = static_cast<int64_t>(array.shape(0));
  Rounding made;
  {
    const auto entered = self.enter();
    const nb::gil_scoped_release release;
    made = entered->fill_matrix(weight, source, rows, first, expert);
  }
  return nb::make_tuple(made.squares, made.lost);
}

// Calls f(table, parts, image) with an adapter's image: its table, int64 [parts, kPartColumns], and its data.
template <class F>
auto with_image(const In<int64_t>& table, const nb::object& data, F f) {
  if (table.ndim() != 2 || table.shape(1) != kPartColumns) throw std::invalid_argument("adapter: a table of other columns");
  In<uint8_t> bytes;
  if (!nb::try_cast(data, bytes, false)) throw std::invalid_argument("adapter: data is an array of uint8");
  return f(table.data(), static_cast<int64_t>(table.shape(0)), ImageData{bytes.data(), static_cast<int64_t>(bytes.size())});
}

// The data is not copied.
int32_t add_adapter(Native& self, const In<int64_t>& table, const nb::object& data) {
  const auto entered = self.enter();
  const int32_t slot = with_image(table, data, [&](auto... image) { return entered->add_adapter(image...); });
  self.images[slot] = data;
  return slot;
}

void write_kv(Native& self, int32_t op, const In<int32_t>& slots, const In<float>& keys, const In<float>& values) {
  if (slots.ndim() != 1 || keys.ndim() != 2 || values.ndim() != 2 || keys.shape(0) != slots.size() || values.shape(0) != slots.size())
    throw std::invalid_argument("write_kv: keys and values have a row for each slot");
  self.enter()->write_kv(op, slots.data(), slots.size(), {keys.data(), keys.size()}, {values.data(), values.size()});
}

int64_t adapter_width(Native& self, const In<int64_t>& table, const nb::object& data) {
  const auto entered = self.enter();
  return with_image(table, data, [&](auto... image) { return entered->adapter_width(image...); });
}

void release_kv(Native& self, int32_t group, const In<int32_t>& blocks) {
  self.enter()->release_kv(group, blocks.data(), blocks.size());
}

void release_states(Native& self, const In<int32_t>& rows) { self.enter()->release_states(rows.data(), rows.size()); }

void drop_adapter(Native& self, int32_t slot) {
  self.enter()->drop_adapter(slot);
  self.images.erase(slot);
}

// Of a matrix of an adapter.
int32_t adapter_format(const std::string& name) {
  const int32_t format = name == "float16" ? kF16 : format_named(name);
  if (format != kF32 && format != kBF16 && format != kF16) throw std::invalid_argument("panels are float32, bfloat16 or float16");
  return format;
}

Form form_named(const std::string& name) {
  if (name == "whole") return Form::kWhole;
  if (name == "rows") return Form::kRows;
  if (name == "columns") return Form::kColumns;
  throw std::invalid_argument("form is " + name + ": one of whole, rows, columns");
}

// Bytes of a matrix of an adapter in panels, whose first `outputs` lanes it takes.
int64_t adapter_matrix_bytes(int64_t outputs, int64_t inputs, int32_t format, Form form) {
  if (form == Form::kRows) return rows_bytes(format, inputs, outputs);
  return PanelOrder{outputs, 0}.panels() * (form == Form::kColumns ? column_bytes : panel_bytes)(format, inputs);
}

// Packs a matrix [rows, inputs] into panels of `format`, its first row in lane `lane`, over zeroed uint8 of that size.
void pack_panels(const AnyArray& array, const nb::ndarray<uint8_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>& to,
                 const std::string& format_name, int64_t lane, const std::string& form_name) {
  const Source source = source_of(array);
  const auto rows = static_cast<int64_t>(array.shape(0));
  const int32_t format = adapter_format(format_name);
  const Form form = form_named(form_name);
  if (format == kF16 && source.type != Stored::kFloat16) throw std::invalid_argument("only float16 is packed as that");
  if (lane < 0 || lane >= kLanes || (lane && form == Form::kRows) || rows > kMaxWidth || source.inputs > kMaxWidth)
    throw std::invalid_argument("a lane outside its panel, or a matrix that is too large");
  const PanelOrder order{lane + rows, 0};
  if (static_cast<int64_t>(to.size()) != adapter_matrix_bytes(lane + rows, source.inputs, format, form))
    throw std::invalid_argument("panels of another size");
  const InFlightCall call;
  const nb::gil_scoped_release release;
  pack_rows(source, 0, rows, to.data(), format, lane, order, form);
}

Out<float> logits(Native& self, size_t vocab) {
  const auto entered = self.enter();
  const Executable& e = self.executable;
  if (!self.inputs.is_valid()) throw std::invalid_argument("the program is not sealed");
  if (static_cast<int64_t>(vocab) > e.logits_stride()) throw std::invalid_argument("logits are not that wide");
  return floats(e.logits_row(0), static_cast<size_t>(e.logit_rows()), vocab, e.logits_stride());
}

Out<float> tap(Native& self, int32_t op) {
  const auto entered = self.enter();
  const std::vector<float> kept = entered->tap(op);
  const auto width = static_cast<size_t>(entered->tap_width(op));
  return floats(kept.data(), kept.size() / width, width, static_cast<int64_t>(width));
}

nb::tuple sample(Native& self, const nb::object& samples) {
  const auto entered = self.enter();
  const int64_t rows = entered->logit_rows();
  HeldArrays held;
  const SampleArgs args = sample_args(held, samples, rows, entered->sampler().vocab());
  return sampled(rows, entered->begin_sample(args), [&](const SampleOut& out) { entered->sample(args, out); });
}

void set_sequence(Native& self, int32_t slot, const In<int32_t>& prompt, const In<int32_t>& completion,
                  const nb::object& sampling) {
  const auto entered = self.enter();
  Sampler& sampler = entered->sampler();
  sampler.set_sequence(slot, sequence_state(prompt, completion, sampling, sampler.vocab()));
}

// Fills an op's fields from keyword arguments of the same names; None leaves a field's own value.
struct FieldReader {
  nb::kwargs given;
  const char* kind;

  [[noreturn]] void fail(const char* name, const char* why) const {
    throw std::invalid_argument(std::string(kind) + ": " + name + " " + why);
  }
  // The argument, which is then no longer among those left over.
  nb::object take(const char* name) {
    if (!given.contains(name)) fail(name, "is missing");
    nb::object value = given[name];
    nb::del(given[name]);
    return value;
  }
  template <class T, class... Optional>
  void operator()(const char* name, T& field, Optional...) {
    const nb::object value = take(name);
    if (value.is_none()) {
      // An id that an op must have would otherwise be that of weight 0.
      if constexpr (std::is_same_v<T, int32_t>)
        if (field != kAbsent) fail(name, "is None");
      return;
    }
    if constexpr (std::is_same_v<T, Ref>) field = ref_of(value);
    else if (!nb::try_cast(value, field)) fail(name, "is a value that its C++ type does not hold");
  }
  template <size_t N>
  void operator()(const char* name, int32_t& field, const char* const (&words)[N]) {
    const nb::object value = take(name);
    if (value.is_none()) return;
    const auto word = nb::cast<std::string>(value);
    const auto found = std::find(words, words + N, word);
    if (found == words + N) fail(name, ("is " + word + ", which this backend does not have").c_str());
    field = static_cast<int32_t>(found - words);
  }
};

// Calls f(a default op) for each kind of op, in the variant's order.
template <class F>
void for_each_kind(F&& f) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    (f(std::variant_alternative_t<I, Op>{}), ...);
  }(std::make_index_sequence<std::variant_size_v<Op>>());
}

void add_op(Native& self, const std::string& kind, const nb::kwargs& fields) {
  bool known = false;
  for_each_kind(
      [&](auto op) {
        if (kind != op.kName) return;
        known = true;
        FieldReader reader{fields, op.kName};
        op.fields(op, reader);
        for (const auto& [name, value] : reader.given) reader.fail(nb::cast<std::string>(name).c_str(), "is unknown");
        self.enter()->add(op);
      });
  if (!known) throw std::invalid_argument("there is no op " + kind);
}

// {op: {field: its words, or None}}.
nb::dict op_fields() {
  nb::dict ops;
  for_each_kind(
      [&](auto op) {
        nb::dict fields;
        op.fields(op, [&]<class T, class... Note>(const char* name, const T&, Note&&... note) {
          fields[name] = nb::none();
          if constexpr ((std::is_array_v<std::remove_reference_t<Note>> || ...)) {
            nb::list words;
            for (const char* word : (note, ...)) words.append(word);
            fields[name] = words;
          }
        });
        ops[op.kName] = fields;
      });
  return ops;
}

std::vector<std::string> table_names() {
  std::vector<std::string> names;
  for (const Kernels* table : tables()) names.emplace_back(table->name);
  return names;
}

void bind_load(nb::class_<Native>& c) {
  c.def("add_buffer",
        [](Native& self, int64_t offset, int64_t stride, bool logit_rows, bool rounded) {
          self.enter()->add_buffer({offset, stride, logit_rows, rounded});
        },
        "offset"_a, "stride"_a, "logit_rows"_a, "rounded"_a)
      .def("add_vector",
           [](Native& self, const In<float>& values) {
             return self.enter()->add_vector(values.data(), static_cast<int64_t>(values.size()));
           },
           "values"_a)
      .def("add_matrix",
           [](Native& self, int64_t outputs, int64_t inputs, const std::string& format, bool panels, int64_t half, int64_t experts) {
             return self.enter()->add_matrix(outputs, inputs, format_named(format), panels, half, experts);
           },
           "outputs"_a, "inputs"_a, "format"_a, "panels"_a, "half"_a, "experts"_a = 1)
      .def("add_latent_matrix",
           [](Native& self, int32_t heads, int32_t keys, int32_t values, int64_t inputs, const std::string& format) {
             return self.enter()->add_latent_matrix({heads, keys, values}, inputs, format_named(format));
           },
           "heads"_a, "keys"_a, "values"_a, "inputs"_a, "format"_a)
      .def("fill", fill, "weight"_a, "array"_a, "first"_a, "kind"_a = "", "expert"_a = 0)
      .def("seal", seal, "inputs"_a, "arena_floats"_a, "logits_buffer"_a, "vocab"_a, "planned_width"_a)
      .def("add_state", [](Native& self, int64_t width) { self.enter()->add_state(width); }, "width"_a)
      .def("add", add_op, "op"_a, "fields"_a)
      .def("add_site",
           [](Native& self, int32_t site, int32_t op, int64_t first, int64_t outputs, int64_t expert) {
             self.enter()->add_site(site, op, first, outputs, expert);
           },
           "site"_a, "op"_a, "first"_a, "outputs"_a, "expert"_a = 0);
}

void bind_step(nb::class_<Native>& c) {
  c.def("run", run)
      .def("logits", logits, "vocab"_a)
      .def("set_sequence", set_sequence, "slot"_a, "prompt_ids"_a.noconvert(), "completion_ids"_a.noconvert(), "sampling"_a)
      .def("sample", sample, "samples"_a)
      .def("tap", tap, "op"_a)
      .def("add_adapter", add_adapter, "table"_a.noconvert(), "data"_a)
      .def("adapter_width", adapter_width, "table"_a.noconvert(), "data"_a)
      .def("drop_adapter", drop_adapter, "slot"_a)
      .def("write_kv", write_kv, "op"_a, "slots"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert())
      .def("release_kv", release_kv, "group"_a, "blocks"_a.noconvert())
      .def("release_states", release_states, "rows"_a.noconvert())
      .def("take_seconds",
           [](Native& self) {
             const auto seconds = self.enter()->take_seconds();
             nb::dict by_op;
             size_t kind = 0;
             for_each_kind([&](const auto& op) { by_op[op.kName] = seconds[kind++]; });
             return by_op;
           })
      .def_prop_ro("isa", [](const Native& self) { return std::string(self.executable.kernels().name); });
}

// What memory plans need, without an executable.
void bind_sizes(nb::module_& m) {
  m.attr("LANES") = kLanes;
  m.attr("BLOCK") = kBlock;
  m.attr("PLANNED_RANK") = kPlannedRank;
  m.attr("SAMPLE_SCRATCH_BYTES") = kSampleScratchBytes;
  m.def("matrix_bytes",
        [](int64_t outputs, int64_t inputs, const std::string& format, bool panels, int64_t half) {
          return matrix_bytes(format_named(format), inputs, panels, {outputs, half});
        },
        "outputs"_a, "inputs"_a, "format"_a, "panels"_a = true, "half"_a = 0, "Bytes of a matrix in panels, or as plain rows.");
  m.def("adapter_matrix_bytes",
        [](int64_t outputs, int64_t inputs, const std::string& format, const std::string& form) {
          return adapter_matrix_bytes(outputs, inputs, adapter_format(format), form_named(form));
        },
        "outputs"_a, "inputs"_a, "format"_a, "form"_a, "Bytes of a matrix of an adapter, in a form that `pack_panels` takes.");
  m.def("converted_bytes",
        [](const std::string& isa, int32_t rows, int64_t inputs, const std::string& format) -> int64_t {
          const int32_t number = format_named(format);
          if (!is_quantised(number) && !(reads_pairs(number) && find_table(isa)->pairs)) return 0;
          return padded_rows(rows) * quantised_row_bytes(number, inputs);
        },
        "isa"_a, "rows"_a, "inputs"_a, "format"_a, "Bytes of x as products with a matrix of this format read it.");
  m.def("scaled_x_floats", [](int64_t inputs, const std::string& format) { return scaled_x_floats(format_named(format), inputs); },
        "inputs"_a, "format"_a, "Floats of a row of x that an adapter has scaled for a product with a matrix of this format.");
  m.def("latent_matrix_bytes",
        [](int32_t heads, int32_t keys, int32_t values, int64_t inputs, const std::string& format) {
          return LatentOrder{heads, keys, values}.bytes(format_named(format), inputs);
        },
        "heads"_a, "keys"_a, "values"_a, "inputs"_a, "format"_a, "Bytes of a matrix of latent attention.");
  m.def("latent_block_bytes",
        [](int32_t width, int32_t block_size, const std::string& format) {
          return latent_block_bytes(width, format_named(format), block_size);
        },
        "width"_a, "block_size"_a, "format"_a, "Bytes of a block of one layer's latents.");
  m.def("latent_scratch_bytes",
        [](int32_t heads, int32_t width, int32_t rank, int32_t block_size) {
          if (std::min({heads, width, rank, block_size}) < 1) throw std::invalid_argument("a size is below 1");
          return 4 * latent_scratch_of(heads, width, rank, block_size);
        },
        "heads"_a, "width"_a, "rank"_a, "block_size"_a, "Bytes of scratch memory of latent attention per thread.");
  m.def("delta_scratch_bytes", [](int64_t dim_k) { return 4 * delta_scratch(dim_k); }, "dim_k"_a,
        "Bytes of scratch that a gated delta op needs per thread.");
  m.def("expert_scratch_bytes",
        [](int64_t outputs, int64_t inputs, const std::string& format, int64_t half, int64_t threads) {
          const int32_t number = format_named(format);
          return expert_scratch_bytes(inputs, PanelOrder{outputs, half}.panels(), quantised_row_bytes(number, inputs), threads);
        },
        "outputs"_a, "inputs"_a, "format"_a, "half"_a, "threads"_a, "Bytes of scratch memory per thread of products with experts.");
  m.def("state_row_bytes", state_row_bytes, "width"_a, "Bytes of one row of a state.");
  const auto attention = [](int32_t heads, int32_t kv_heads, int32_t dim_k, int32_t dim_v, int32_t block_size) {
    if (std::min({heads, kv_heads, dim_k, dim_v, block_size}) < 1) throw std::invalid_argument("a size is below 1");
    AttentionOp op;
    op.heads = heads, op.kv_heads = kv_heads, op.dim_k = dim_k, op.dim_v = dim_v;
    return op;
  };
  m.def("kv_block_bytes",
        [=](int32_t heads, int32_t kv_heads, int32_t dim_k, int32_t dim_v, int32_t block_size, const std::string& format) {
          const auto [keys, values] =
              kv_block_bytes(attention(heads, kv_heads, dim_k, dim_v, block_size), format_named(format), block_size);
          return keys + values;
        },
        "heads"_a, "kv_heads"_a, "dim_k"_a, "dim_v"_a, "block_size"_a, "format"_a, "Bytes of a block of one layer's keys and values.");
  m.def("attention_scratch_bytes",
        [=](int32_t heads, int32_t kv_heads, int32_t dim_k, int32_t dim_v, int32_t block_size) {
          return 4 * attention_scratch_of(attention(heads, kv_heads, dim_k, dim_v, block_size), block_size);
        },
        "heads"_a, "kv_heads"_a, "dim_k"_a, "dim_v"_a, "block_size"_a, "Bytes of scratch memory per thread.");
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The CPU backend: a program's ops on packed weights, run by a team of threads.";
  m.def("op_fields", op_fields, "Names of the fields of each op that `add` takes, with the words of those that are words.");
  m.def("table_names", table_names, "Instruction sets this machine can run, the best first.");
  m.def("pack_panels", pack_panels, "array"_a, "to"_a.noconvert(), "format"_a, "lane"_a, "form"_a,
        "A matrix in panels of 16 rows, as adapters are read: what the loading worker calls.");
  nb::class_<Native> executable(m, "Executable");
  executable.def(nb::init<const std::string&, int, const nb::object&, const std::string&, int32_t, bool>(), "isa"_a, "threads"_a,
                 "capacity"_a, "kv_format"_a, "groups"_a, "debug"_a);
  bind_sizes(m);
  bind_load(executable);
  bind_step(executable);
  wait_for_calls_at_exit();
}

}  // namespace truffula
