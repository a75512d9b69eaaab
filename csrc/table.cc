// The table of this instruction set's kernels.
#include "kernels.h"

#define DLM_TEXT_(a) #a
#define DLM_TEXT(a) DLM_TEXT_(a)

namespace dlm {
namespace DLM_ISA {

#define DLM_DECLARATION(name, Args) void name(const Args&, const Parallel&);
DLM_KERNELS(DLM_DECLARATION)

}  // namespace DLM_ISA

extern const Kernels DLM_JOIN(kernels_, DLM_ISA);
const Kernels DLM_JOIN(kernels_, DLM_ISA) = {
    .isa = DLM_TEXT(DLM_ISA),
#define DLM_ENTRY(name, Args) .name = DLM_ISA::name,
    DLM_KERNELS(DLM_ENTRY)
};

}  // namespace dlm
