// The kernels as XLA calls them: each handler unpacks buffers into the kernel's arguments. Shapes were checked in Python; an
// operand that is absent comes as an array with no elements.
#include "handlers.h"

#include <stdexcept>
#include <string_view>

#include "kernels.h"
#include "xla_parallel.h"

namespace dlm {
namespace {

namespace ffi = xla::ffi;
using Operand = ffi::AnyBuffer;
using Output = ffi::Result<ffi::AnyBuffer>;

DType dtype(const Operand& operand) {
  switch (operand.element_type()) {
    case ffi::F32: return DType::kFloat32;
    case ffi::BF16: return DType::kBFloat16;
    case ffi::F16: return DType::kFloat16;
    default: throw std::invalid_argument("expected float32, bfloat16 or float16");
  }
}

DType dtype(std::string_view name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("logits_dtype: expected float32, bfloat16 or float16");
}

Scoring::Confidence confidence_of(std::string_view name) {
  if (name == "probability") return Scoring::Confidence::kProbability;
  if (name == "margin") return Scoring::Confidence::kMargin;
  if (name == "neg_entropy") return Scoring::Confidence::kNegEntropy;
  throw std::invalid_argument("confidence: expected probability, margin or neg_entropy");
}

template <typename T>
const T* optional(const Operand& operand) {
  return operand.element_count() == 0 ? nullptr : static_cast<const T*>(operand.untyped_data());
}

template <typename T>
T* data(const Operand& operand) {
  return static_cast<T*>(operand.untyped_data());
}

template <typename T>
T* data(Output& output) {
  return static_cast<T*>(output->untyped_data());
}

// Runs `body` and turns what it throws into an error of the call: an exception must not cross XLA's C interface.
template <typename Body>
ffi::Error guarded(Body&& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

AttentionArgs attention_args(const Operand& query, const Operand& key, const Operand& value, const Operand& bounds,
                             float scale, float soft_cap) {
  const auto q = query.dimensions(), k = key.dimensions(), bound = bounds.dimensions();
  AttentionArgs args{};
  args.dtype = dtype(query);
  args.b = q[0], args.t = q[1], args.s = k[1], args.n = q[2], args.k = k[2], args.h = q[3];
  args.query = query.untyped_data(), args.key = key.untyped_data(), args.value = value.untyped_data();
  args.bounds = optional<int32_t>(bounds);
  if (args.bounds != nullptr) args.bounds_b = bound[0], args.bounds_width = bound[2];
  args.scale = scale, args.soft_cap = soft_cap;
  return args;
}

ffi::Error attention_forward(ffi::ThreadPool pool, Operand query, Operand key, Operand value, Operand bounds, Output out,
                             Output lse, float scale, float soft_cap) {
  return guarded([&] {
    AttentionArgs args = attention_args(query, key, value, bounds, scale, soft_cap);
    args.out = data<void>(out), args.lse = data<float>(lse);
    kernels().attention_forward(args, XlaParallel(pool));
  });
}

ffi::Error attention_backward(ffi::ThreadPool pool, Operand query, Operand key, Operand value, Operand bounds, Operand out,
                              Operand lse, Operand dout, Operand dlse, Output dquery, Output dkey, Output dvalue,
                              float scale, float soft_cap) {
  return guarded([&] {
    AttentionArgs args = attention_args(query, key, value, bounds, scale, soft_cap);
    args.out = out.untyped_data(), args.lse = data<float>(lse);
    args.dout = dout.untyped_data(), args.dlse = data<float>(dlse);
    args.dquery = data<void>(dquery), args.dkey = data<void>(dkey), args.dvalue = data<void>(dvalue);
    kernels().attention_backward(args, XlaParallel(pool));
  });
}

Scoring scoring(const Operand& temperature, const Operand& key_data, const Operand& counter_row, const Operand& noise,
                const Operand& active, const Operand& banned, Output& token, Output& confidence, Output& entropy,
                Output& logsumexp, std::string_view confidence_kind, bool tempered_confidence, float soft_cap) {
  Scoring args{};
  args.temperature = optional<float>(temperature), args.key_data = optional<uint32_t>(key_data);
  args.counter_row = optional<int32_t>(counter_row), args.noise = optional<float>(noise);
  args.active = optional<bool>(active), args.banned = optional<int32_t>(banned);
  args.banned_count = banned.element_count();
  args.confidence_kind = confidence_of(confidence_kind);
  args.tempered_confidence = tempered_confidence, args.soft_cap = soft_cap;
  args.token = data<int32_t>(token), args.confidence = data<float>(confidence);
  args.entropy = data<float>(entropy), args.logsumexp = data<float>(logsumexp);
  return args;
}

ffi::Error score_tokens(ffi::ThreadPool pool, Operand logits, Operand unconditional, Operand guidance_scale,
                        Operand temperature, Operand key_data, Operand counter_row, Operand noise, Operand active,
                        Operand banned, Output token, Output confidence, Output entropy, Output logsumexp,
                        std::string_view confidence_kind, bool tempered_confidence, float soft_cap) {
  return guarded([&] {
    ScoreArgs args{};
    args.dtype = dtype(logits);
    args.r = logits.dimensions()[0], args.v = logits.dimensions()[1];
    args.logits = logits.untyped_data(), args.unconditional = optional<void>(unconditional);
    args.guidance_scale = optional<float>(guidance_scale);
    args.scoring = scoring(temperature, key_data, counter_row, noise, active, banned, token, confidence, entropy, logsumexp,
                           confidence_kind, tempered_confidence, soft_cap);
    kernels().score_tokens(args, XlaParallel(pool));
  });
}

ffi::Error unmask_topk(ffi::ThreadPool pool, Operand tokens, Operand proposal, Operand confidence, Operand entropy,
                       Operand eligible, Operand editable, Operand num_unmask, Operand threshold, Operand factor,
                       Operand entropy_budget, Operand edit_threshold, Output new_tokens, Output unmasked, Output count) {
  return guarded([&] {
    UnmaskArgs args{};
    args.b = tokens.dimensions()[0], args.l = tokens.dimensions()[1];
    args.tokens = data<int32_t>(tokens), args.proposal = data<int32_t>(proposal);
    args.confidence = data<float>(confidence), args.entropy = optional<float>(entropy);
    args.eligible = data<bool>(eligible), args.editable = optional<bool>(editable);
    args.num_unmask = optional<int32_t>(num_unmask), args.threshold = optional<float>(threshold);
    args.factor = optional<float>(factor), args.entropy_budget = optional<float>(entropy_budget);
    args.edit_threshold = optional<float>(edit_threshold);
    args.new_tokens = data<int32_t>(new_tokens), args.unmasked = data<bool>(unmasked), args.count = data<int32_t>(count);
    kernels().unmask_topk(args, XlaParallel(pool));
  });
}

ffi::Error mix_guidance(ffi::ThreadPool pool, Operand conditional, Operand unconditional, Operand scale, Output out) {
  return guarded([&] {
    const auto shape = conditional.dimensions();
    MixArgs args{dtype(conditional), 2, shape[0], shape[1], {conditional.untyped_data(), unconditional.untyped_data()},
                 data<float>(scale), data<void>(out)};
    kernels().mix_guidance(args, XlaParallel(pool));
  });
}

ffi::Error combine_guidance(ffi::ThreadPool pool, Operand logits, Operand weights, Output out) {
  return guarded([&] {
    const auto shape = logits.dimensions();
    MixArgs args{dtype(logits), shape[0], shape[1], shape[2], {logits.untyped_data(), nullptr}, data<float>(weights),
                 data<void>(out)};
    kernels().combine_guidance(args, XlaParallel(pool));
  });
}

ffi::Error truncate_logits(ffi::ThreadPool pool, Operand logits, Operand inverse_temperature, Operand top_p, Operand top_k,
                           Output out) {
  return guarded([&] {
    const auto shape = logits.dimensions();
    TruncateArgs args{dtype(logits), shape[0], shape[1], logits.untyped_data(), data<float>(inverse_temperature),
                      optional<float>(top_p), optional<int32_t>(top_k), data<void>(out)};
    kernels().truncate_logits(args, XlaParallel(pool));
  });
}

ffi::Error lm_head_scores(ffi::ThreadPool pool, Operand hidden, Operand weight, Operand temperature, Operand key_data,
                          Operand counter_row, Operand noise, Operand active, Operand banned, Output token,
                          Output confidence, Output entropy, Output logsumexp, std::string_view confidence_kind,
                          bool tempered_confidence, float soft_cap, std::string_view logits_dtype, int64_t vocabulary) {
  return guarded([&] {
    HeadArgs args{};
    args.dtype = dtype(hidden);
    args.r = hidden.dimensions()[0], args.d = hidden.dimensions()[1], args.v = vocabulary;
    args.hidden = hidden.untyped_data(), args.weight = weight.untyped_data(), args.packed = weight.dimensions().size() == 4;
    args.round_logits = logits_dtype != "";
    if (args.round_logits) args.logits_dtype = dtype(logits_dtype);
    args.scoring = scoring(temperature, key_data, counter_row, noise, active, banned, token, confidence, entropy, logsumexp,
                           confidence_kind, tempered_confidence, soft_cap);
    kernels().lm_head_scores(args, XlaParallel(pool));
  });
}

CrossEntropyArgs cross_entropy_args(const Operand& hidden, const Operand& weight, const Operand& targets,
                                    const Operand& active, float soft_cap) {
  CrossEntropyArgs args{};
  args.dtype = dtype(hidden);
  args.r = hidden.dimensions()[0], args.d = hidden.dimensions()[1], args.v = weight.dimensions()[0];
  args.hidden = hidden.untyped_data(), args.weight = weight.untyped_data();
  args.targets = data<int32_t>(targets), args.active = data<bool>(active);
  args.soft_cap = soft_cap;
  return args;
}

ffi::Error masked_cross_entropy_forward(ffi::ThreadPool pool, Operand hidden, Operand weight, Operand targets,
                                        Operand active, Output loss, Output lse, float soft_cap) {
  return guarded([&] {
    CrossEntropyArgs args = cross_entropy_args(hidden, weight, targets, active, soft_cap);
    args.loss = data<float>(loss), args.lse = data<float>(lse);
    kernels().masked_cross_entropy_forward(args, XlaParallel(pool));
  });
}

ffi::Error masked_cross_entropy_backward(ffi::ThreadPool pool, Operand hidden, Operand weight, Operand targets,
                                         Operand active, Operand lse, Operand dloss, Output dhidden, Output dweight,
                                         float soft_cap) {
  return guarded([&] {
    CrossEntropyArgs args = cross_entropy_args(hidden, weight, targets, active, soft_cap);
    args.lse = data<float>(lse), args.dloss = data<float>(dloss);
    args.dhidden = data<void>(dhidden), args.dweight = data<void>(dweight);
    kernels().masked_cross_entropy_backward(args, XlaParallel(pool));
  });
}

DivergenceArgs divergence_args(const Operand& hidden, const Operand& weight, const Operand& target_hidden,
                               const Operand& target_weight, const Operand& active) {
  DivergenceArgs args{};
  args.dtype = dtype(hidden);
  args.r = hidden.dimensions()[0], args.d = hidden.dimensions()[1], args.v = weight.dimensions()[0];
  args.e = target_hidden.dimensions()[1];
  args.hidden = hidden.untyped_data(), args.weight = weight.untyped_data();
  args.target_hidden = target_hidden.untyped_data(), args.target_weight = target_weight.untyped_data();
  args.active = data<bool>(active);
  return args;
}

ffi::Error masked_divergence_forward(ffi::ThreadPool pool, Operand hidden, Operand weight, Operand target_hidden,
                                     Operand target_weight, Operand active, Output loss, Output lse, Output target_lse) {
  return guarded([&] {
    DivergenceArgs args = divergence_args(hidden, weight, target_hidden, target_weight, active);
    args.loss = data<float>(loss), args.lse = data<float>(lse), args.target_lse = data<float>(target_lse);
    kernels().masked_divergence_forward(args, XlaParallel(pool));
  });
}

ffi::Error masked_divergence_backward(ffi::ThreadPool pool, Operand hidden, Operand weight, Operand target_hidden,
                                      Operand target_weight, Operand active, Operand lse, Operand target_lse, Operand dloss,
                                      Output dhidden, Output dweight) {
  return guarded([&] {
    DivergenceArgs args = divergence_args(hidden, weight, target_hidden, target_weight, active);
    args.lse = data<float>(lse), args.target_lse = data<float>(target_lse);
    args.dloss = data<float>(dloss);
    args.dhidden = data<void>(dhidden), args.dweight = data<void>(dweight);
    kernels().masked_divergence_backward(args, XlaParallel(pool));
  });
}

MixtureArgs::Activation activation_of(std::string_view name) {
  if (name == "silu") return MixtureArgs::Activation::kSilu;
  if (name == "gelu") return MixtureArgs::Activation::kGelu;
  throw std::invalid_argument("activation: expected silu or gelu");
}

ffi::Error mix_experts(ffi::ThreadPool pool, Operand x, Operand gate, Operand up, Operand down, Operand expert,
                       Operand weight, Output out, std::string_view activation) {
  return guarded([&] {
    const auto shape = gate.dimensions();
    MixtureArgs args{};
    args.dtype = dtype(x);
    args.r = x.dimensions()[0], args.k = expert.dimensions()[1], args.e = shape[0], args.d = shape[1], args.f = shape[2];
    args.x = x.untyped_data(), args.gate = gate.untyped_data(), args.up = up.untyped_data(), args.down = down.untyped_data();
    args.expert = data<int32_t>(expert), args.weight = data<float>(weight);
    args.activation = activation_of(activation);
    args.out = data<void>(out);
    kernels().mix_experts(args, XlaParallel(pool));
  });
}

ffi::Error matmul(ffi::ThreadPool pool, Operand x, Operand weight, Output out) {
  return guarded([&] {
    MatmulArgs args{};
    args.dtype = dtype(x);
    args.r = x.dimensions()[0], args.d = weight.dimensions()[0], args.f = weight.dimensions()[1];
    args.x = x.untyped_data(), args.weight = weight.untyped_data();
    args.out = data<void>(out);
    kernels().matmul(args, XlaParallel(pool));
  });
}

// Appends Count results, or operands, to a binding. A binding cannot be moved, only extended, hence no base case that returns it.
template <bool Results, int Count, typename Binding>
auto append(Binding&& binding) {
  if constexpr (Count > 1) return append<Results, Count - 1>(append<Results, 1>(std::move(binding)));
  else if constexpr (Results) return std::move(binding).template Ret<ffi::AnyBuffer>();
  else return std::move(binding).template Arg<Operand>();
}

template <int Operands, int Results>
auto bind() {
  return append<true, Results>(append<false, Operands>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()));
}

template <int Operands>
auto bind_scoring() {
  return bind<Operands, 4>().template Attr<std::string_view>("confidence").template Attr<bool>("tempered_confidence")
      .template Attr<float>("soft_cap");
}

// handle_<kernel>: the function above as XLA calls it.
#define DLM_HANDLER(kernel, ...) XLA_FFI_DEFINE_HANDLER(handle_##kernel, kernel, (__VA_ARGS__))
DLM_HANDLER(attention_forward, bind<4, 2>().Attr<float>("scale").Attr<float>("soft_cap"));
DLM_HANDLER(attention_backward, bind<8, 3>().Attr<float>("scale").Attr<float>("soft_cap"));
DLM_HANDLER(score_tokens, bind_scoring<9>());
DLM_HANDLER(unmask_topk, bind<11, 3>());
DLM_HANDLER(mix_guidance, bind<3, 1>());
DLM_HANDLER(combine_guidance, bind<2, 1>());
DLM_HANDLER(truncate_logits, bind<4, 1>());
DLM_HANDLER(lm_head_scores, bind_scoring<8>().Attr<std::string_view>("logits_dtype").Attr<int64_t>("vocabulary"));
DLM_HANDLER(masked_cross_entropy_forward, bind<4, 2>().Attr<float>("soft_cap"));
DLM_HANDLER(masked_cross_entropy_backward, bind<6, 2>().Attr<float>("soft_cap"));
DLM_HANDLER(masked_divergence_forward, bind<5, 3>());
DLM_HANDLER(masked_divergence_backward, bind<8, 2>());
DLM_HANDLER(mix_experts, bind<6, 1>().Attr<std::string_view>("activation"));
DLM_HANDLER(matmul, bind<2, 1>());

}  // namespace

const std::vector<Handler>& handlers() {
#define DLM_ENTRY(name, Args) {#name, handle_##name},
  static const std::vector<Handler> all = {DLM_KERNELS(DLM_ENTRY)};
  return all;
}

}  // namespace dlm
