// A stand-in for an accelerator, to test without one. Its tensors lie in the memory of the CPU and the kernels of the
// CPU do its work, so every figure is what it is there; but tensors of both devices in one operation are refused, so is
// float64, which Apple's devices do not have, and what a program would have to wait for is counted.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <map>
#include <optional>
#include <string>

namespace {

constexpr auto HERE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(HERE, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);
std::map<std::string, int64_t> waits;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<HERE> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return DEVICE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(DEVICE); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeDevice(const c10::DeviceIndex) const override { waits["synchronize"]++; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Generator final : c10::GeneratorImpl {
  at::Generator own = at::detail::createCPUGenerator();

  Generator() : GeneratorImpl(DEVICE, KEYS) {}
  void set_current_seed(uint64_t seed) override { own.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return own.current_seed(); }
  uint64_t seed() override { return own.seed(); }
  void set_state(const c10::TensorImpl& state) override { own.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return own.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override {
    auto* copy = new Generator();
    copy->own = own.clone();
    return copy;
  }
};

at::Generator& global() {
  static auto made = at::make_generator<Generator>();
  return made;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return global(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(size);
    return {data, data, raw_deleter(), DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return c10::GetCPUAllocator()->raw_deleter(); }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
} memory;

bool here(const at::Tensor& x) { return x.defined() && x.device().type() == HERE; }

// The same numbers in the same memory, as a tensor of another device.
c10::Storage shared(const c10::Storage& storage, c10::Device device, c10::Allocator* allocator) {
  auto release = [](void* kept) { delete static_cast<c10::Storage*>(kept); };
  c10::DataPtr data(const_cast<void*>(storage.data()), new c10::Storage(storage), release, device);
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, /*resizable=*/true};
}

at::Tensor moved(const at::Tensor& x, c10::Device device, c10::Allocator* allocator, c10::DispatchKeySet keys) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(shared(x.storage(), device, allocator), keys, x.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return made;
}

at::Tensor plain(const at::Tensor& x) {
  return here(x) ? moved(x, at::kCPU, c10::GetCPUAllocator(), c10::DispatchKeySet(c10::DispatchKey::CPU)) : x;
}

// Neither float64 nor pairs of them.
at::ScalarType had(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype != at::kDouble && dtype != at::kComplexDouble, "standin: there is no ", dtype, " on this device");
  return dtype;
}

at::Tensor back(const at::Tensor& x) {
  if (!x.defined() || !x.is_cpu()) return x;
  had(x.scalar_type());
  return moved(x, DEVICE, &memory, KEYS);
}

// Lets a tensor that the CPU's kernel has resized follow.
void follow(const at::Tensor& x, const at::Tensor& written) {
  auto* bare = x.unsafeGetTensorImpl();
  if (written.storage().data() != x.storage().data())
    bare->set_storage_keep_dtype(shared(written.storage(), DEVICE, &memory));
  bare->set_sizes_and_strides(written.sizes(), written.strides(), written.storage_offset());
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, had(c10::dtype_or_default(dtype)), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, had(c10::dtype_or_default(dtype)));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  plain(to).copy_(plain(from));
  if (!here(to)) waits["copy to the CPU"]++;
  return to;
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                       c10::IntArrayRef output_padding, int64_t groups) {
  TORCH_CHECK(here(x) && here(weight), "convolution: expected all tensors to be on the same device");
  auto added = bias.has_value() ? std::optional(plain(*bias)) : std::nullopt;
  return back(at::convolution(plain(x), plain(weight), added, stride, padding, dilation, transposed, output_padding,
                              groups));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> mask) {
  auto [a, b, c] = at::convolution_backward(plain(grad), plain(x), plain(weight), weight.size(0), stride, padding,
                                            dilation, transposed, output_padding, groups, mask);
  return {back(a), back(b), back(c)};
}

// Every other operation: the CPU's kernel on the same memory.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name().substr(schema.name().find("::") + 2);
  for (const auto* each : {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"})
    if (name == each) waits[name]++;

  const auto count = schema.arguments().size();
  const auto start = stack->size() - count;
  std::vector<c10::IValue> given(stack->begin() + start, stack->end());
  bool ours = false, theirs = false;
  auto taken = [&](const at::Tensor& x) {
    if (here(x)) ours = true;
    else if (x.defined() && x.dim() > 0) theirs = true;
    return plain(x);
  };
  for (auto& value : torch::jit::last(*stack, count)) {
    auto& slot = const_cast<c10::IValue&>(value);
    if (slot.isTensor()) {
      slot = taken(slot.toTensor());
    } else if (slot.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& x : slot.toTensorList()) list.push_back(taken(x));
      slot = list;
    } else if (slot.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (std::optional<at::Tensor> x : slot.toOptionalTensorList())
        list.push_back(x.has_value() ? std::optional(taken(*x)) : std::nullopt);
      slot = list;
    } else if (slot.isGenerator() && slot.toGenerator().device() == DEVICE) {
      slot = static_cast<Generator*>(slot.toGenerator().unsafeGetGeneratorImpl())->own;
    } else if (slot.isDevice()) {
      slot = c10::Device(at::kCPU);
    }
  }
  TORCH_CHECK(!(ours && theirs), name, ": expected all tensors to be on the same device, but found cpu and standin");

  std::vector<c10::IValue> used(stack->begin() + start, stack->end());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t k = 0; k < count; k++)
    if (given[k].isTensor() && here(given[k].toTensor()) && schema.arguments()[k].alias_info() != nullptr &&
        schema.arguments()[k].alias_info()->isWrite())
      follow(given[k].toTensor(), used[k].toTensor());
  for (size_t k = 0; k < schema.returns().size(); k++) {
    auto& answer = (*stack)[stack->size() - schema.returns().size() + k];
    const auto* alias = schema.returns()[k].alias_info();
    if (answer.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& x : answer.toTensorList()) list.push_back(back(x));
      answer = list;
    } else if (answer.isTensor()) {
      at::Tensor found;
      for (size_t j = 0; j < count && alias != nullptr && alias->isWrite(); j++)
        if (schema.arguments()[j].alias_info() != nullptr && *schema.arguments()[j].alias_info() == *alias)
          found = given[j].toTensor();
      answer = found.defined() ? found : back(answer.toTensor());
    }
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

}  // namespace

namespace at::autocast {
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
}
}  // namespace at::autocast

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(HERE, &memory);
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("get_rng_state", [] { return global().get_state(); });
  m.def("set_rng_state", [](const at::Tensor& state) { global().set_state(state); });
  m.def("waits", [] { return std::exchange(waits, {}); });
}
