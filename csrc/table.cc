// The table of this instruction set's kernels.
#include "kernels.h"

#define DLM_TEXT_(a) #a
#define DLM_TEXT(a) DLM_TEXT_(a)

namespace dlm {
namespace DLM_ISA {

void attention_forward(const AttentionArgs&, const Parallel&);
void attention_backward(const AttentionArgs&, const Parallel&);
void score_tokens(const ScoreArgs&, const Parallel&);
void unmask_topk(const UnmaskArgs&, const Parallel&);
void mix_guidance(const MixArgs&, const Parallel&);
void combine_guidance(const MixArgs&, const Parallel&);
void truncate_logits(const TruncateArgs&, const Parallel&);
void lm_head_scores(const HeadArgs&, const Parallel&);
void masked_cross_entropy_forward(const CrossEntropyArgs&, const Parallel&);
void masked_cross_entropy_backward(const CrossEntropyArgs&, const Parallel&);
void masked_divergence_forward(const DivergenceArgs&, const Parallel&);
void masked_divergence_backward(const DivergenceArgs&, const Parallel&);
void mix_experts(const MixtureArgs&, const Parallel&);

}  // namespace DLM_ISA

extern const Kernels DLM_JOIN(kernels_, DLM_ISA);
const Kernels DLM_JOIN(kernels_, DLM_ISA) = {
    .isa = DLM_TEXT(DLM_ISA),
    .attention_forward = DLM_ISA::attention_forward,
    .attention_backward = DLM_ISA::attention_backward,
    .score_tokens = DLM_ISA::score_tokens,
    .unmask_topk = DLM_ISA::unmask_topk,
    .mix_guidance = DLM_ISA::mix_guidance,
    .combine_guidance = DLM_ISA::combine_guidance,
    .truncate_logits = DLM_ISA::truncate_logits,
    .lm_head_scores = DLM_ISA::lm_head_scores,
    .masked_cross_entropy_forward = DLM_ISA::masked_cross_entropy_forward,
    .masked_cross_entropy_backward = DLM_ISA::masked_cross_entropy_backward,
    .masked_divergence_forward = DLM_ISA::masked_divergence_forward,
    .masked_divergence_backward = DLM_ISA::masked_divergence_backward,
    .mix_experts = DLM_ISA::mix_experts,
};

}  // namespace dlm
