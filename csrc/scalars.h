// How a tensor's memory is described to the kernels of every device, without torch headers.
#pragma once

namespace gspo {

enum class Scalar : int { kFloat, kDouble, kBFloat16, kHalf, kByte };

struct Vector {  // a contiguous vector of T numbers, or nothing
  const void* data = nullptr;
  Scalar type = Scalar::kFloat;
};

}  // namespace gspo
