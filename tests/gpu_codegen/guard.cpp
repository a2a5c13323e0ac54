// Device guards for GPUs that are not there: fake tensors "on" them may then be indexed, which sets the device.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

template <DeviceType type>
struct AbsentDevice final : NoOpDeviceGuardImpl<type> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(CUDA, AbsentDevice<DeviceType::CUDA>);
C10_REGISTER_GUARD_IMPL(XPU, AbsentDevice<DeviceType::XPU>);

}  // namespace c10::impl
