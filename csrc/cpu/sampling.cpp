// sample, argmax; see torch_pagedkv/ops/sampling.py, which defines the distribution and the random stream.
//
// A row is copied once, divided by the temperature, together with the maximum of each chunk of 64. Top-k, top-p and
// min-p then only raise one threshold on z, and the chunk maxima let the passes skip what cannot matter: chunks below
// the threshold, and chunks, or whole groups, that even the luckiest random number would not let win.

#include <cmath>
#include <limits>

#include "../philox.h"
#include "tensors.h"

namespace pagedkv {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kLuckiest = 22.9;  // above -log(E) at the smallest w, 2^-33
constexpr int kGroup = 256;         // entries that race as one in the first heat
static_assert(kGroup % kChunk == 0);

// -log(E) of a random word.
double gumbel(uint32_t word) {
  const double w = std::min((double(word) + 0.5) * 0x1p-32, 1 - 0x1p-24);
  return -std::log(-std::log1p(-w));
}

struct Params {
  float temperature = 1, top_p = 1, min_p = 0;
  int64_t top_k = 0;
  uint64_t seed = 0, offset = 0;
};

class RowSampler {
 public:
  // logits [n] of the dtype with index `type`; the token, or -1.
  int64_t operator()(const char* logits, int type, int64_t n, const Params& params) {
    if (params.temperature == 0) return rows().argmax[type](logits, n);
    n_ = n;
    z_.resize((n + kChunk - 1) / kChunk * kChunk);
    chunk_max_.resize(z_.size() / kChunk);
    rows().prepare[type](logits, params.temperature, z_.data(), chunk_max_.data(), n);
    max_ = *std::max_element(chunk_max_.begin(), chunk_max_.end());
    if (!std::isfinite(max_)) {
      const int64_t best = rows().argmax[type](logits, n);
      if (best < 0) return -1;
      float value;
      rows().convert[type][kFloat32](logits + best * kRowTypeSize[type], 1.f, &value, 1);
      if (value != kInf) return best;  // a temperature so small that z overflows
      only_infinities();
    }
    keep_ = -kInf;
    if (!(params.top_k > 0 && params.top_k < n) && !(params.top_p < 1) && !(params.min_p > 0)) {
      const int64_t first = best_group(params) * (kGroup / kChunk);
      return race(params, first, std::min<int64_t>(first + kGroup / kChunk, chunk_max_.size()));
    }
    if (params.top_k > 0 && params.top_k < n) keep_ = kth_largest(params.top_k);
    if (params.top_p < 1) keep_ = top_p(params.top_p);
    if (params.min_p > 0) keep_ = std::max(keep_, float(max_ + std::log(double(params.min_p))));
    return race(params, 0, chunk_max_.size());
  }

 private:
  void only_infinities() {
    for (float& z : z_) z = z == kInf ? 0.f : -kInf;
    for (float& m : chunk_max_) m = m == kInf ? 0.f : -kInf;
    max_ = 0;
  }

  // Calls f(i) for every i with z[i] >= least.
  template <class F>
  void at_least(float least, const F& f) const {
    for (size_t c = 0; c < chunk_max_.size(); ++c)
      if (chunk_max_[c] >= least)
        for (size_t i = c * kChunk; i < (c + 1) * kChunk; ++i)
          if (z_[i] >= least) f(i);
  }

  float kth_largest(int64_t k) {
    values_ = chunk_max_;
    float least = -kInf;
    if (k <= int64_t(values_.size())) {  // k chunks have an element as large as the k-th largest maximum
      std::nth_element(values_.begin(), values_.begin() + (k - 1), values_.end(), std::greater<>());
      least = values_[k - 1];
    }
    values_.clear();
    at_least(least, [&](size_t i) { values_.push_back(z_[i]); });
    std::nth_element(values_.begin(), values_.begin() + (k - 1), values_.end(), std::greater<>());
    return values_[k - 1];
  }

  float top_p(float p) {
    terms_.resize(z_.size());
    const double total = rows().softmax_terms(z_.data(), max_, keep_, terms_.data(), z_.size()), target = p * total;
    // All elements whose terms are below (1 - p) * total / n add up to less than what may be left out.
    const double cut = max_ + std::log((1 - double(p)) * total / double(n_)) - 1e-3;
    kept_.clear();
    at_least(std::max(keep_, float(std::min(cut, double(max_)))),
             [&](size_t i) { kept_.push_back({z_[i], terms_[i]}); });
    // The first position, in descending order, at which the sum reaches the target, without sorting it all.
    double above = 0;
    auto first = kept_.begin(), last = kept_.end();
    while (last - first > 1) {
      const auto middle = first + (last - first) / 2;
      std::nth_element(first, middle, last, [](const Term& a, const Term& b) { return a.z > b.z; });
      double sum = above;
      for (auto it = first; it != middle; ++it) sum += it->mass;
      if (sum >= target) {
        last = middle;
      } else {
        above = sum;
        first = middle;
      }
    }
    return first->z;
  }

  // The first heat's winner.
  int64_t best_group(const Params& params) {
    const PhiloxStream stream = philox_stream(int64_t(params.seed), int64_t(params.offset));
    terms_.resize(kGroup);
    double best = -std::numeric_limits<double>::infinity();
    int64_t winner = 0;
    for (int64_t g = 0, chunk = 0, chunks = chunk_max_.size(); chunk < chunks; ++g, chunk += kGroup / kChunk) {
      const int64_t count = std::min<int64_t>(kGroup / kChunk, chunks - chunk);
      const float top = *std::max_element(&chunk_max_[chunk], &chunk_max_[chunk] + count);
      if (double(top) - max_ + std::log(double(kGroup)) + kLuckiest < best || top == -kInf) continue;
      const double mass = rows().softmax_terms(&z_[chunk * kChunk], top, -kInf, terms_.data(), count * kChunk);
      const double score = double(top) - max_ + std::log(mass) + gumbel(philox4(stream, uint32_t(g / 4), 1).x[g % 4]);
      if (score > best) {
        best = score;
        winner = g;
      }
    }
    return winner;
  }

  // The winner of chunks [first, end).
  int64_t race(const Params& params, int64_t first, int64_t end) {
    RaceChunk chunk;
    chunk.seed = params.seed;
    chunk.offset = params.offset;
    double best = -std::numeric_limits<double>::infinity();
    int64_t winner = -1;
    auto run = [&](int64_t c, float keep) {
      chunk.z = z_.data() + c * kChunk;
      chunk.block = c * (kChunk / 4);
      chunk.keep = keep;
      chunk.best = std::nextafter(float(best), -kInf);  // never above the true best
      for (int i = 0, found = rows().race(&chunk); i < found; ++i) {
        const int64_t index = c * kChunk + chunk.index[i];
        const double score = double(z_[index]) + gumbel(chunk.word[i]);
        if (score > best || (score == best && index < winner)) {
          best = score;
          winner = index;
        }
      }
    };
    // The largest z first: its score rules most of the others out.
    const auto largest = std::max_element(&chunk_max_[first], &chunk_max_[0] + end) - &chunk_max_[0];
    run(largest, chunk_max_[largest]);
    for (int64_t c = first; c < end; ++c)
      if (chunk_max_[c] >= keep_ && chunk_max_[c] >= best - kLuckiest) run(c, keep_);
    return winner;
  }

  struct Term {
    float z, mass;
  };
  int64_t n_;
  float max_, keep_;              // kept: z >= keep_
  std::vector<float> z_;          // [n], padded with -inf to whole chunks
  std::vector<float> chunk_max_;  // [chunks]
  std::vector<float> values_, terms_;
  std::vector<Term> kept_;
};

template <class T>
const T* data(const OptTensor& t) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

Tensor sample(Tensor logits, Tensor seeds, Tensor offsets, OptTensor temperature, OptTensor top_k, OptTensor top_p,
              OptTensor min_p) {
  check_sample(logits, seeds, offsets, temperature, top_k, top_p, min_p);
  const int64_t batch = logits.size(0);
  const auto *seed = data<int64_t>(seeds), *offset = data<int64_t>(offsets);
  const auto *t = data<float>(temperature), *p = data<float>(top_p), *m = data<float>(min_p);
  const auto* k = data<int32_t>(top_k);
  for (int64_t r = 0; t && r < batch; ++r)
    PAGEDKV_CHECK(t[r] >= 0, "sample", "temperature", t[r] << " for row " << r, "0 or more");
  const Rows in(logits);
  const int type = row_type(logits);
  Tensor out = new_tensor(&batch, 1, aoti_torch_dtype_int64());
  int64_t* tokens = static_cast<int64_t*>(out.mutable_data_ptr());
  split(batch, 4 * in.n, [&](int64_t begin, int64_t end) {
    static thread_local RowSampler sampler;  // keeps its buffers
    for (int64_t r = begin; r < end; ++r) {
      Params params;
      if (t) params.temperature = t[r];
      if (k) params.top_k = k[r];
      if (p) params.top_p = p[r];
      if (m) params.min_p = m[r];
      params.seed = uint64_t(seed[r]);
      params.offset = uint64_t(offset[r]);
      tokens[r] = sampler(in[r], type, in.n, params);
    }
  });
  return out;
}

Tensor argmax(Tensor logits) {
  check_logits("argmax", logits);
  const Rows in(logits);
  const int64_t batch = in.count;
  Tensor out = new_tensor(&batch, 1, aoti_torch_dtype_int64());
  int64_t* tokens = static_cast<int64_t*>(out.mutable_data_ptr());
  const auto kernel = rows().argmax[row_type(logits)];
  split(batch, in.n, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) tokens[r] = kernel(in[r], in.n);
  });
  return out;
}

}  // namespace
}  // namespace pagedkv

STABLE_TORCH_LIBRARY_IMPL(torch_pagedkv, CPU, m) {
  PAGEDKV_IMPL(m, sample, pagedkv::sample);
  PAGEDKV_IMPL(m, argmax, pagedkv::argmax);
}
