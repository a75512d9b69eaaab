// The Python module: hands out the FFI handlers, and says which instruction sets there are, and which was chosen.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "handlers.h"
#include "kernels.h"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, module) {
  module.def("isa", [] { return dlm::kernels().isa; });
  module.def("available_isas", dlm::available_isas);
  module.def("ffi_handlers", [] {
    py::dict handlers;
    for (const dlm::Handler& handler : dlm::handlers())
      handlers[handler.name] = py::capsule(reinterpret_cast<void*>(handler.call), "xla._CUSTOM_CALL_TARGET");
    return handlers;
  });
}
