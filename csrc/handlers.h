// The kernels as XLA calls them.
#pragma once

#include <vector>

#include "xla/ffi/api/c_api.h"

namespace dlm {

struct Handler {
  const char* name;
  XLA_FFI_Handler* call;
};

const std::vector<Handler>& handlers();

}  // namespace dlm
