// Tensors of device "cuda" for a PyTorch without CUDA: memory of the CPU, and operations that do nothing or, where
// values are needed, are those of the CPU. Dispatcher, autograd engine and Triton's launcher run as they do on a GPU.
#include <Python.h>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_map>
#include <vector>

using namespace at;

static thread_local int current_device = 0;
static const DispatchKeySet keys(DispatchKey::CUDA);

static Device first_device() { return Device(DeviceType::CUDA, 0); }
static Stream only_stream() { return Stream(Stream::DEFAULT, first_device()); }

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  Guard() {}
  explicit Guard(DeviceType) {}
  static void set(Device device) { current_device = device.index() < 0 ? 0 : device.index(); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return Device(DeviceType::CUDA, current_device); }
  Device exchangeDevice(Device device) const override {
    auto before = getDevice();
    set(device);
    return before;
  }
  void setDevice(Device device) const override { set(device); }
  void uncheckedSetDevice(Device device) const noexcept override { set(device); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const noexcept override { return only_stream(); }
  Stream getDefaultStream(Device) const override { return only_stream(); }
  Stream exchangeStream(Stream) const noexcept override { return only_stream(); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks final : public at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  Device getDeviceFromPtr(void*) const override { return first_device(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

// Keeps freed blocks by size, as the caching allocator of a GPU does.
struct BlockAllocator final : public c10::Allocator {
  struct Blocks {
    std::mutex mutex;
    std::unordered_map<size_t, std::vector<void*>> free;
    std::unordered_map<void*, size_t> sizes;
    bool reused = true;
  };
  static Blocks& blocks() {
    static Blocks all;
    return all;
  }
  static void release(void* pointer) {
    if (!pointer) return;
    std::lock_guard<std::mutex> lock(blocks().mutex);
    if (blocks().reused) blocks().free[blocks().sizes[pointer]].push_back(pointer);
  }
  DataPtr allocate(size_t nbytes) override {
    void* pointer = nullptr;
    if (nbytes) {
      size_t size = (nbytes + 511) / 512 * 512;
      std::lock_guard<std::mutex> lock(blocks().mutex);
      auto& free = blocks().free[size];
      if (free.empty()) {
        pointer = aligned_alloc(512, size);
        blocks().sizes[pointer] = size;
      } else {
        pointer = free.back();
        free.pop_back();
      }
    }
    return {pointer, pointer, &release, first_device()};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t nbytes) const override {
    memcpy(target, source, nbytes);
  }
};
static BlockAllocator allocator;

// The same memory on another device.
static Tensor moved(const Tensor& tensor, DispatchKeySet to, Device device, c10::Allocator* with) {
  auto storage = new c10::Storage(tensor.storage());
  DataPtr data(storage->data_ptr().get(), storage, [](void* kept) { delete static_cast<c10::Storage*>(kept); }, device);
  c10::Storage other(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(data), with, false);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(other), to, tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}
static Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  return moved(tensor, DispatchKeySet(DispatchKey::CPU), Device(DeviceType::CPU), nullptr);
}
static Tensor on_gpu(const Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cuda()) return tensor;
  return moved(tensor, keys, first_device(), &allocator);
}

static Tensor idle_empty(
    IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device>,
    std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, keys, dtype_or_default(dtype), format);
}
static Tensor idle_empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
    std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, dtype_or_default(dtype));
}
static Tensor& idle_copy_(Tensor& self, const Tensor& source, bool) {
  if (self.is_cuda() && source.is_cuda()) return self;
  auto target = on_cpu(self), from = on_cpu(source);
  c10::InferenceMode inference;
  at::AutoDispatchBelowADInplaceOrView below;
  target.copy_(from);
  return self;
}
static Tensor idle_copy_from(const Tensor& self, const Tensor& target, bool) {
  Tensor result = target;
  return idle_copy_(result, self, false);
}
static Tensor idle_sum(
    const Tensor& self, OptionalIntArrayRef dims, bool keepdim, std::optional<ScalarType> dtype) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < self.dim(); i++) {
    bool is_summed = !dims.has_value() || dims->empty();
    if (dims.has_value())
      for (auto dim : *dims) is_summed |= (dim < 0 ? dim + self.dim() : dim) == i;
    if (!is_summed) shape.push_back(self.size(i));
    else if (keepdim) shape.push_back(1);
  }
  return at::detail::empty_generic(shape, &allocator, keys, dtype.value_or(self.scalar_type()), std::nullopt);
}
static Tensor& idle_zero_(Tensor& self) { return self; }
static Tensor& idle_fill_(Tensor& self, const Scalar&) { return self; }
static Tensor idle_eq(const Tensor& self, const Scalar&) { return at::empty_like(self, self.options().dtype(at::kBool)); }
static Tensor idle_masked_fill(const Tensor& self, const Tensor&, const Scalar&) { return at::empty_like(self); }
static Tensor idle_mul(const Tensor& self, const Tensor& other) {
  return at::empty(at::infer_size(self.sizes(), other.sizes()), self.options());
}
static Tensor idle_softplus(const Tensor& self, const Scalar&, const Scalar&) { return at::empty_like(self); }
static Scalar idle_item(const Tensor& self) { return at::_local_scalar_dense(on_cpu(self)); }

// Every other operation is that of the CPU.
static void fallback(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto count = schema.arguments().size(), returned = schema.returns().size();
  const auto given = torch::jit::last(*stack, count).vec();
  torch::jit::drop(*stack, count);
  for (auto value : given) {
    if (value.isTensor()) {
      value = on_cpu(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& tensor : value.toTensorList()) list.push_back(on_cpu(tensor));
      value = list;
    } else if (value.isDevice()) {
      value = Device(DeviceType::CPU);
    }
    torch::jit::push(*stack, value);
  }
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  auto results = torch::jit::last(*stack, returned).vec();
  torch::jit::drop(*stack, returned);
  for (size_t i = 0; i < returned; i++) {
    const auto* alias = schema.returns()[i].alias_info();
    bool is_argument = false;
    for (size_t j = 0; alias && alias->isWrite() && j < count && !is_argument; j++) {
      const auto* of_argument = schema.arguments()[j].alias_info();
      if (of_argument && *of_argument == *alias) {
        results[i] = given[j];
        is_argument = true;
      }
    }
    if (!is_argument && results[i].isTensor()) results[i] = on_gpu(results[i].toTensor());
    torch::jit::push(*stack, results[i]);
  }
}

// cuDNN's attention: room for its results, without what cuDNN does on the host.
static void idle_attention(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto given = torch::jit::last(*stack, op.schema().arguments().size()).vec();
  torch::jit::drop(*stack, given.size());
  const Tensor query = given[0].toTensor(), key = given[1].toTensor();
  const Tensor number = at::empty({}, query.options().dtype(at::kLong));
  auto sizes = query.sizes().vec();
  sizes[3] = 1;
  torch::jit::push(*stack, at::empty_like(query), at::empty(sizes, query.options().dtype(at::kFloat)), Tensor(), Tensor());
  torch::jit::push(*stack, query.size(2), key.size(2), number, number, Tensor());
}
static void idle_attention_backward(const c10::OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto given = torch::jit::last(*stack, op.schema().arguments().size()).vec();
  torch::jit::drop(*stack, given.size());
  for (int i : {1, 2, 3}) torch::jit::push(*stack, at::empty_like(given[i].toTensor()));
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", idle_empty);
  library.impl("empty_strided", idle_empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("copy_", idle_copy_);
  library.impl("_copy_from", idle_copy_from);
  library.impl("_local_scalar_dense", idle_item);
  library.impl("sum.dim_IntList", idle_sum);
  library.impl("zero_", idle_zero_);
  library.impl("fill_.Scalar", idle_fill_);
  library.impl("eq.Scalar", idle_eq);
  library.impl("masked_fill.Scalar", idle_masked_fill);
  library.impl("softplus", idle_softplus);
  library.impl("mul.Tensor", idle_mul);
  library.impl("_scaled_dot_product_cudnn_attention",
               torch::CppFunction::makeFromBoxedFunction<&idle_attention>());
  library.impl("_scaled_dot_product_cudnn_attention_backward",
               torch::CppFunction::makeFromBoxedFunction<&idle_attention_backward>());
}

static PyObject* get_device(PyObject*, PyObject*) { return PyLong_FromLong(current_device); }
static PyObject* exchange_device(PyObject*, PyObject* device) {
  int before = current_device;
  long index = PyLong_AsLong(device);
  if (index >= 0) current_device = index;
  return PyLong_FromLong(before);
}
// Functions of their own, as Dynamo tells them apart.
static PyObject* set_device(PyObject* self, PyObject* device) { return exchange_device(self, device); }
static PyObject* maybe_exchange_device(PyObject* self, PyObject* device) { return exchange_device(self, device); }
static PyObject* get_stream(PyObject*, PyObject*) { return PyLong_FromLong(0); }

static PyObject* reuse_memory(PyObject*, PyObject* reused) {
  BlockAllocator::blocks().reused = PyObject_IsTrue(reused);
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"reuse_memory", reuse_memory, METH_O, nullptr},
    {"_cuda_getDevice", get_device, METH_NOARGS, nullptr},
    {"_cuda_setDevice", set_device, METH_O, nullptr},
    {"_cuda_exchangeDevice", exchange_device, METH_O, nullptr},
    {"_cuda_maybeExchangeDevice", maybe_exchange_device, METH_O, nullptr},
    {"_cuda_getCurrentRawStream", get_stream, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "idle_gpu_device", nullptr, -1, methods};

PyMODINIT_FUNC PyInit_idle_gpu_device() {
  c10::SetAllocator(DeviceType::CUDA, &allocator);
  return PyModule_Create(&definition);
}
