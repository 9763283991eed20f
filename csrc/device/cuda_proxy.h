// A backend in the CUDA library, reached through its table.
#pragma once

#include <memory>

#include "cuda/api.h"

namespace pgolf {

// Throws what a status stands for, unless it is kDone.
void throw_status(abi::Status status, const char* message);

std::unique_ptr<Backend> make_cuda_proxy(const abi::Api& api, int device, DType storage);

}  // namespace pgolf
