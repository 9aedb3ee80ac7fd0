// An emulated accelerator for the tests: two devices whose kernels are the CPU's.
//
// It is as strict as a real one where a host is lenient: devices do not mix, memory that was not written or was given
// back holds NaN, each device draws from a generator of its own, and autograd runs in threads of its own. Work is not
// late, as it is on a real device; but what each stream is known to have waited for is followed, so that an access that
// a real device could make too early is reported.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

// The header of these two brings in every operator, and doubles the time to compile.
namespace at::autocast {
TORCH_API Tensor cached_cast(at::ScalarType, const Tensor&, c10::DeviceType);
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType);
}  // namespace at::autocast

namespace {

using at::Tensor;
using c10::OperatorHandle;
using torch::jit::Stack;

constexpr auto kEmu = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
constexpr int kPoison = 0xff;  // NaN in every floating-point type, -1 in integers

std::recursive_mutex lock;
int64_t launches = 0, synchronisations = 0, bytes[kDevices], peak[kDevices];
std::map<std::string, int64_t> kernels;

thread_local c10::DeviceIndex current = 0;
thread_local c10::StreamId current_stream[kDevices] = {0, 0};

// ---- what every stream has waited for

using StreamKey = std::pair<int, c10::StreamId>;
using Clock = std::map<StreamKey, int64_t>;

struct Memory {
  size_t size = 0;
  StreamKey owner;
  Clock written, read;
  std::set<StreamKey> recorded;
};

std::map<StreamKey, Clock> clocks;
Clock host;
std::map<const void*, Memory> memories;
std::map<StreamKey, Clock> given_back;  // work that may still use memory which its stream's next kernel may get
std::vector<std::string> races;

void wait(Clock& mine, const Clock& other) {
  for (auto& [stream, n] : other) mine[stream] = std::max(mine[stream], n);
}

StreamKey stream_of(c10::Device device) {
  const int index = device.has_index() ? device.index() : current;
  return {index, current_stream[index]};
}

bool seen(const StreamKey& stream, const Clock& work, const std::string& what) {
  for (auto& [other, n] : work) {
    if (other != stream && clocks[stream][other] < n) {
      races.push_back(c10::str(what, " on stream ", stream.second, " of device ", stream.first,
                               " does not wait for stream ", other.second, " of device ", other.first));
      return false;
    }
  }
  return true;
}

void launch(const StreamKey& stream, const std::string& name) {
  ++launches;
  ++kernels[name];
  wait(clocks[stream], host);
  ++clocks[stream][stream];
  seen(stream, given_back[stream], "memory given back to " + name);
  given_back[stream].clear();
}

void touch(const Tensor& tensor, bool writes, const StreamKey& stream, const std::string& name) {
  auto found = memories.find(tensor.storage().data());
  if (found == memories.end()) return;
  Memory& memory = found->second;
  seen(stream, memory.written, (writes ? "write by " : "read by ") + name);
  if (writes) {
    seen(stream, memory.read, "write by " + name);
    memory.read.clear();
    memory.written = {{stream, clocks[stream][stream]}};
  } else {
    memory.read[stream] = clocks[stream][stream];
  }
}

void synchronise(const StreamKey& stream) {
  ++synchronisations;
  wait(host, clocks[stream]);
}

// ---- memory

void give_back(void* pointer) {
  if (!pointer) return;
  std::lock_guard guard(lock);
  Memory& memory = memories[pointer];
  bytes[memory.owner.first] -= static_cast<int64_t>(memory.size);
  for (auto* work : {&memory.written, &memory.read}) {
    for (auto& [stream, n] : *work) {
      if (stream != memory.owner && !memory.recorded.count(stream)) wait(given_back[memory.owner], {{stream, n}});
    }
  }
  std::memset(pointer, kPoison, memory.size);
  memories.erase(pointer);
  std::free(pointer);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    const c10::Device device(kEmu, current);
    if (!n) return {nullptr, nullptr, &give_back, device};
    std::lock_guard guard(lock);
    void* pointer = std::malloc(n);
    std::memset(pointer, kPoison, n);
    memories[pointer] = {n, stream_of(device), {}, {}, {}};
    bytes[current] += static_cast<int64_t>(n);
    peak[current] = std::max(peak[current], bytes[current]);
    return {pointer, pointer, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t n) const override { default_copy_data(to, from, n); }
};

Allocator allocator;
REGISTER_ALLOCATOR(kEmu, &allocator)

// ---- devices and streams

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kEmu; }
  c10::Device getDevice() const override { return {kEmu, current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Device exchangeDevice(c10::Device device) const override { return {kEmu, std::exchange(current, device.index())}; }
  c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

  static c10::Stream stream(int device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kEmu, static_cast<c10::DeviceIndex>(device)), id);
  }
  c10::Stream getStream(c10::Device device) const override {
    auto [index, id] = stream_of(device);
    return stream(index, id);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(stream_of(device).first, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    static std::atomic<c10::StreamId> next{1};
    return stream(stream_of(device).first, next++);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    return stream(s.device_index(), std::exchange(current_stream[s.device_index()], s.id()));
  }

  void record(void** event, const c10::Stream& s, c10::DeviceIndex, c10::EventFlag) const override {
    std::lock_guard guard(lock);
    if (!*event) *event = new Clock;
    *static_cast<Clock*>(*event) = clocks[{s.device_index(), s.id()}];
  }
  void block(void* event, const c10::Stream& s) const override {
    std::lock_guard guard(lock);
    if (event) wait(clocks[{s.device_index(), s.id()}], *static_cast<Clock*>(event));
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Clock*>(event); }
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeEvent(void* event) const override {
    std::lock_guard guard(lock);
    ++synchronisations;
    if (event) wait(host, *static_cast<Clock*>(event));
  }
  void synchronizeStream(const c10::Stream& s) const override {
    std::lock_guard guard(lock);
    synchronise({s.device_index(), s.id()});
  }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    std::lock_guard guard(lock);
    ++synchronisations;
    for (auto& [stream, clock] : clocks) {
      if (stream.first == device) wait(host, clock);
    }
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& s) const override {
    std::lock_guard guard(lock);
    auto found = memories.find(data.get());
    if (found != memories.end()) found->second.recorded.insert({s.device_index(), s.id()});
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- random numbers

struct Generator final : at::CPUGeneratorImpl {
  explicit Generator(c10::DeviceIndex device) { device_ = c10::Device(kEmu, device); }
};

const at::Generator& default_generator(c10::DeviceIndex device) {
  static const at::Generator each[kDevices] = {at::make_generator<Generator>(c10::DeviceIndex(0)),
                                               at::make_generator<Generator>(c10::DeviceIndex(1))};
  return each[device < 0 ? current : device];
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kDevices; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex device) const override { current = device; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override { return std::exchange(current, device); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<Generator>(device < 0 ? current : device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    c10::DeviceGuard guard(storage.device());
    auto larger = allocator.allocate(n);
    if (storage.nbytes() && n) std::memcpy(larger.get(), storage.data(), std::min(n, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(larger));
    storage.unsafeGetStorageImpl()->set_nbytes(n);
  }
};

Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// ---- kernels

bool on_emu(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kEmu; }

/// The same memory as the host sees it.
Tensor host_view(const Tensor& tensor) {
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), at::dtype(tensor.dtype()).device(at::kCPU));
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  std::lock_guard guard(lock);
  const StreamKey source = stream_of(on_emu(from) ? from.device() : to.device());
  const StreamKey target = stream_of(on_emu(to) ? to.device() : from.device());
  wait(clocks[source], clocks[target]);  // as on a real device, a copy to another one is in order on both
  launch(source, "copy");
  if (on_emu(from)) touch(from, false, source, "copy");
  if (on_emu(to)) touch(to, true, source, "copy");
  wait(clocks[target], clocks[source]);
  (on_emu(to) ? host_view(to) : to).copy_(on_emu(from) ? host_view(from) : from);
  if (!(on_emu(from) && on_emu(to)) && !non_blocking) synchronise(source);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  std::lock_guard guard(lock);
  const StreamKey stream = stream_of(tensor.device());
  launch(stream, "item");
  touch(tensor, false, stream, "item");
  synchronise(stream);
  return at::native::_local_scalar_dense_cpu(host_view(tensor));
}

Tensor as_strided(const Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}

Tensor& set_storage(Tensor& to, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  at::native::checkSetStorage(to, std::move(storage), offset, size, stride);
  to.unsafeGetTensorImpl()->set_storage_offset(offset);
  if (stride.data()) {
    to.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  } else {
    to.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  }
  return to;
}

/// Replaces every tensor of a value, in lists too.
template <class F>
c10::IValue map_tensors(const c10::IValue& value, F&& each) {
  if (value.isTensor()) return each(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(each(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor ? std::optional<Tensor>(each(*tensor)) : std::nullopt);
    }
    return list;
  }
  return value;
}

/// Refuses what a real device refuses; returns the device of the arguments, the current one if there is no tensor.
c10::Device check_devices(const OperatorHandle& op, const std::string& name, c10::ArrayRef<c10::IValue> arguments) {
  static const std::set<std::string> host_indices = {"aten::index", "aten::_index_put_impl_", "aten::index_put",
                                                     "aten::index_put_", "aten::index_fill_"};
  std::optional<c10::Device> device, asked;
  bool from_host = false;
  std::string other;
  for (const auto& argument : arguments) {
    if (argument.isDevice()) asked = argument.toDevice();
    map_tensors(argument, [&](const Tensor& t) {
      if (on_emu(t)) {
        if (device && *device != t.device()) other = t.device().str();
        if (!device) device = t.device();
      } else if (t.defined()) {
        from_host = true;
        const bool number = t.dim() == 0 && op.hasTag(at::Tag::pointwise);
        if (!number && !host_indices.count(op.schema().name())) other = c10::str("cpu, of shape ", t.sizes());
      }
      return t;
    });
  }
  TORCH_CHECK(!device || other.empty(), "Expected all tensors to be on the same device: ", name, " got one on ",
              device->str(), " and one on ", other);
  if (!device) device = asked && asked->has_index() ? *asked : c10::Device(kEmu, current);
  return *device;
}

/// Random numbers on the host from a device's generator while it lives.
struct DeviceNumbers {
  at::Generator ours, theirs = at::detail::getDefaultCPUGenerator();
  Tensor before = theirs.get_state();
  explicit DeviceNumbers(at::Generator generator) : ours(std::move(generator)) { theirs.set_state(ours.get_state()); }
  ~DeviceNumbers() {
    ours.set_state(theirs.get_state());
    theirs.set_state(before);
  }
};

/// Runs `run_as` on the host, on the memory of the arguments.
void run_on_host(const OperatorHandle& op, Stack* stack, const OperatorHandle& run_as) {
  const auto& schema = op.schema();
  const std::string name = schema.name().substr(schema.name().find("::") + 2);
  const size_t n = run_as.schema().arguments().size();
  std::lock_guard lock_guard(lock);
  const c10::Device device = check_devices(op, name, torch::jit::last(*stack, n));
  c10::DeviceGuard device_guard(device);
  const StreamKey stream = stream_of(device);
  launch(stream, name);

  bool waits = op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output);
  std::optional<at::Generator> generator;
  struct Pair {
    Tensor host, emu;
    bool grows;
  };
  std::vector<Pair> pairs;
  for (size_t i = 0; i < n; ++i) {
    c10::IValue& value = stack->at(stack->size() - n + i);
    const auto* alias = run_as.schema().arguments()[i].alias_info();
    const bool writes = alias && alias->isWrite();
    if (value.isDevice()) value = c10::Device(at::kCPU);
    if (value.isGenerator()) {
      generator = value.toGenerator();
      TORCH_CHECK(generator->device().type() == kEmu, "Expected a 'emu' device type for generator but found 'cpu'");
      value = c10::IValue();
    }
    value = map_tensors(value, [&](const Tensor& t) -> Tensor {
      if (!on_emu(t)) return t;
      touch(t, writes, stream, name);
      if (name == "_index_put_impl_" && i == 1 && t.scalar_type() == at::kBool) waits = true;
      for (const Pair& pair : pairs) {
        if (pair.emu.is_same(t)) return pair.host;
      }
      const bool grows = writes && !t.numel();
      pairs.push_back({grows ? at::empty({0}, at::dtype(t.dtype())) : host_view(t), t, grows});
      return pairs.back().host;
    });
  }
  {
    std::optional<DeviceNumbers> numbers;
    if (op.hasTag(at::Tag::nondeterministic_seeded)) {
      numbers.emplace(generator ? *generator : default_generator(device.index()));
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    run_as.callBoxed(stack);
  }
  for (const Pair& pair : pairs) {
    if (!pair.grows || !pair.host.numel()) continue;
    at::native::resize_(pair.emu, pair.host.sizes(), std::nullopt);
    host_view(pair.emu).copy_(pair.host);
  }
  const size_t returned = schema.returns().size();
  for (size_t i = 0; i < returned; ++i) {
    c10::IValue& value = stack->at(stack->size() - returned + i);
    value = map_tensors(value, [&](const Tensor& t) -> Tensor {
      if (!t.defined()) return t;
      for (const Pair& pair : pairs) {
        if (pair.host.is_same(t)) return pair.emu;
      }
      Tensor made = empty_strided(t.sizes(), t.strides(), t.scalar_type(), {}, device, {});
      host_view(made).copy_(t);
      touch(made, true, stream, name);
      return made;
    });
  }
  if (waits) synchronise(stream);
}

void fallback(const OperatorHandle& op, Stack* stack) { run_on_host(op, stack, op); }

OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

void convolution(const OperatorHandle& op, Stack* stack) { run_on_host(op, stack, find("aten::convolution")); }

void convolution_backward(const OperatorHandle& op, Stack* stack) {
  stack->insert(stack->end() - 7, c10::IValue(stack->at(stack->size() - 8).toTensor().sizes().slice(0, 1).vec()));
  // (grad, input, weight, | bias_sizes, | stride, ..., output_mask): of a weight (out, in, ...), a bias has (out,).
  run_on_host(op, stack, find("aten::convolution_backward"));
}

// ---- autocast

template <bool lower>
void cast(const OperatorHandle& op, Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard once(c10::DispatchKey::AutocastPrivateUse1);
  const auto dtype = lower ? at::autocast::get_autocast_dtype(kEmu) : at::kFloat;
  const size_t n = op.schema().arguments().size();
  for (size_t i = stack->size() - n; i < stack->size(); ++i) {
    stack->at(i) = map_tensors(stack->at(i), [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, kEmu); });
  }
  op.callBoxed(stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", [](const Tensor& t, c10::IntArrayRef size) { return at::native::view(t, size); });
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", [](const Tensor& t, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) -> const Tensor& {
    return at::native::resize_(t, size, format);
  });
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  m.impl("set_.source_Storage", [](Tensor& t, at::Storage s) -> Tensor& { return at::native::set_(t, std::move(s)); });
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  for (const char* name : {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d",
                           "scaled_dot_product_attention"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&cast<true>>());
  }
  for (const char* name : {"softmax.int", "log_softmax.int", "nll_loss", "cross_entropy_loss", "layer_norm", "exp", "log"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&cast<false>>());
  }
}

// ---- for Python, by ctypes

extern "C" {
int emu_device_count() { return kDevices; }
int emu_current_device() { return current; }
void emu_set_device(int device) { current = static_cast<c10::DeviceIndex>(device); }
void emu_manual_seed(int device, uint64_t seed) {
  auto generator = default_generator(static_cast<c10::DeviceIndex>(device));
  generator.set_current_seed(seed);
}
int64_t emu_get_rng_state(int device, void* out) {
  Tensor state = default_generator(static_cast<c10::DeviceIndex>(device)).get_state();
  if (out) std::memcpy(out, state.data_ptr(), state.nbytes());
  return static_cast<int64_t>(state.nbytes());
}
void emu_set_rng_state(int device, const void* from, int64_t n) {
  Tensor state = at::empty({n}, at::dtype(at::kByte));
  std::memcpy(state.data_ptr(), from, n);
  auto generator = default_generator(static_cast<c10::DeviceIndex>(device));
  generator.set_state(state);
}
int64_t emu_bytes(int device) { return bytes[device]; }
int64_t emu_peak_bytes(int device) { return peak[device]; }
void emu_reset_peak(int device) { peak[device] = bytes[device]; }
int64_t emu_launches() { return launches; }
int64_t emu_synchronisations() { return synchronisations; }
/// Fills `out` with "name count" lines of the kernels launched so far; returns the length that it takes.
int64_t emu_kernels(char* out, int64_t size) {
  std::lock_guard guard(lock);
  std::string lines;
  for (auto& [name, count] : kernels) lines += c10::str(name, " ", count, "\n");
  if (out) std::memcpy(out, lines.data(), std::min<size_t>(size, lines.size()));
  return static_cast<int64_t>(lines.size());
}
/// The same of races, and forgets them once they are handed out.
int64_t emu_races(char* out, int64_t size) {
  std::lock_guard guard(lock);
  std::string lines;
  for (auto& race : races) lines += race + "\n";
  if (out) {
    std::memcpy(out, lines.data(), std::min<size_t>(size, lines.size()));
    races.clear();
  }
  return static_cast<int64_t>(lines.size());
}
}
