#include "filter_samples.h"

#include <cstring>

namespace fastres::cpu {
namespace {

// Calls f(address of the sample, its index) for every filter of the range.
template <typename F>
void for_each_sample(const at::Tensor& weight, Range filters, const F& f) {
  const auto* const data = static_cast<const char*>(weight.const_data_ptr());
  const int64_t stride = weight.stride(0), size = weight.itemsize();
  const auto values = static_cast<uint64_t>(weight.numel() / weight.size(0));
  for (int64_t i = filters.begin; i < filters.end; ++i) {
    // Multiples of the golden ratio, modulo one, spread evenly and hit no regular pattern.
    const auto fraction = static_cast<uint32_t>(static_cast<uint64_t>(i) * 0x9E3779B9u);
    const auto inside = static_cast<int64_t>((fraction * values) >> 32);
    f(data + (i * stride + inside) * size, i);
  }
}

// No branch on what was read: then the loads, most of which miss the caches, do not wait for each
// other.
template <typename Word>
bool same_words(const at::Tensor& weight, Range filters, const char* values) {
  Word differences = 0;
  for_each_sample(weight, filters, [&](const char* sample, int64_t i) {
    Word now, then;
    std::memcpy(&now, sample, sizeof(Word));
    std::memcpy(&then, values + i * sizeof(Word), sizeof(Word));
    differences |= static_cast<Word>(now ^ then);
  });
  return differences == 0;
}

}  // namespace

FilterSamples::FilterSamples(const at::Tensor& weight)
    : values_(static_cast<size_t>(weight.size(0) * weight.itemsize())) {
  const auto size = static_cast<int64_t>(weight.itemsize());
  for_each_sample(weight, {0, weight.size(0)}, [&](const char* sample, int64_t i) {
    std::memcpy(values_.data() + i * size, sample, static_cast<size_t>(size));
  });
}

bool FilterSamples::match(const at::Tensor& weight, Range filters) const {
  switch (weight.itemsize()) {
    case 2:
      return same_words<uint16_t>(weight, filters, values_.data());
    case 4:
      return same_words<uint32_t>(weight, filters, values_.data());
    default:
      return same_words<uint64_t>(weight, filters, values_.data());
  }
}

}  // namespace fastres::cpu
