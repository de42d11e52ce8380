// Loaded before PyTorch's CUDA libraries: there is no accelerator, so nothing asks the missing driver for one.
#include <optional>

namespace c10 {
enum class DeviceType : signed char {};
}

namespace at::accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) { return std::nullopt; }
__attribute__((visibility("default"))) bool isAccelerator(c10::DeviceType) { return false; }
}  // namespace at::accelerator
