// units: PAGEDKV_HEAD_DIM=64,128,256
// The instantiations of paged_prefill_sm90.cuh.
#include <cmath>

#include "paged_prefill_sm90.cuh"

namespace pagedkv::prefill::sm90 {

namespace {

// A bound on the work items: sequences own disjoint rows, and none has more than max_query_len tokens.
int64_t items(const Params& p, int rows) {
  const AttentionParams& a = p.a;
  const int64_t longest = (int64_t(a.max_query_len) * p.group + rows - 1) / rows;
  return a.num_kv_heads * std::min(int64_t(a.num_tokens) * p.group / rows + a.num_seqs, int64_t(a.num_seqs) * longest);
}

template <class T, class S>
void launch(const Call& call, int sms, cudaStream_t stream) {
  const auto kernel = prefill_sm90_kernel<T, S>;
  STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes));
  const unsigned grid = unsigned(std::min<int64_t>(items(call.p, S::kRows), sms));
  launch_kernel(kernel, grid, S::kThreads, S::kBytes, stream, call);
}

// Whether 192 rows an item are faster than 128: they take 1.4 times as long, on an H200. Where items are alike, it is
// their rounds over the SMs that count; where a causal mask makes them shorter and shorter, the sum of their lengths, a
// quarter of the longest for the end, and no less than that one. The host does not know how long a prefix is: not, it
// is taken, unless there is room for more keys than twice the queries.
bool three_consumers(const Params& p, int sms) {
  const AttentionParams& a = p.a;
  const bool shrinking = a.causal && a.max_key_len < 2 * int64_t(a.max_query_len) &&
                         (a.window == 0 || 2 * int64_t(a.window) > a.max_query_len);
  auto rounds = [&](int rows) {
    const double share = double(items(p, rows)) / sms;
    if (!shrinking) return std::ceil(share);
    const double tiles = std::ceil(double(a.max_query_len) * p.group / rows);
    return std::max(1., share * (tiles + 1) / (2 * tiles) + 0.25);
  };
  return 1.4 * rounds(192) <= rounds(128);
}

}  // namespace

template <class T, int kDim>
void launch_bucket(const Call& call, int sms, cudaStream_t stream) {
  if constexpr (kDim <= 128)
    if (three_consumers(call.p, sms)) return launch<T, Shape<kDim, 3>>(call, sms, stream);
  launch<T, Shape<kDim, 2>>(call, sms, stream);
}

template void launch_bucket<__half, PAGEDKV_HEAD_DIM>(const Call&, int, cudaStream_t);
template void launch_bucket<__nv_bfloat16, PAGEDKV_HEAD_DIM>(const Call&, int, cudaStream_t);

}  // namespace pagedkv::prefill::sm90
