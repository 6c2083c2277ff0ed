#include "conv_fold_cache.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/rsqrt.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../checks.h"
#include "conv_pack.h"
#include "pooled.h"

namespace fastres::cpu {
namespace {

constexpr size_t kPacks = 4;    // algorithms or input sizes per entry
constexpr size_t kEntries = 4;  // uses of one weight: other BNs, geometries, dtypes

using Size = std::array<int64_t, 4>;

// W' = W * s and b' = (b - mean) * s + beta with s = gamma / sqrt(var + eps), rounded once.
class Fold {
 public:
  explicit Fold(const ConvBn& c) : c_(c), scale_(at::rsqrt(widen(c.running_var).add(c.eps))) {
    if (given(c.bn_weight)) scale_ = scale_.mul(widen(*c.bn_weight));
  }

  at::Tensor bias() const {
    const auto mean = widen(c_.running_mean);
    auto bias = (given(c_.bias) ? widen(*c_.bias).sub(mean) : mean.neg()).mul(scale_);
    if (given(c_.bn_bias)) bias = bias.add(widen(*c_.bn_bias));
    return bias.to(c_.dtype);
  }

  // Copied rather than made contiguous(), which leaves a 1x1 filter with strides of either format.
  at::Tensor dense() const {
    const auto weight = at::empty(
        c_.weight.sizes(),
        c_.weight.options().dtype(c_.dtype).memory_format(at::MemoryFormat::ChannelsLast));
    weight.copy_(widen(c_.weight).mul(per_filter()));
    return weight;
  }

  // The project's own packing reads any layout: what it reads lies in memory used again and again.
  at::Tensor packed(ConvAlgorithm algorithm) const {
    auto weight = empty_output(c_.weight.sizes(), at::kFloat, output_format(c_.weight));
    at::mul_out(weight, c_.weight, per_filter());
    const auto filters = filters_of(weight, c_.geometry.groups);
    const auto packed = empty_filters(packed_values(filters, algorithm));
    pack_filters(filters, algorithm, packed.mutable_data_ptr<float>());
    return packed;
  }

 private:
  at::Tensor widen(const at::Tensor& t) const { return t.to(accumulate_dtype(c_.dtype)); }
  at::Tensor per_filter() const { return scale_.view({-1, 1, 1, 1}); }

  const ConvBn& c_;
  at::Tensor scale_;
};

at::Tensor pack_for_onednn(const at::Tensor& weight, const ConvGeometry& g,
                           const Size& input_size) {
  using Signature = at::Tensor(const at::Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef,
                               int64_t, at::OptionalIntArrayRef);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mkldnn::_reorder_convolution_weight", "")
                             .typed<Signature>();
  return op.call(weight, g.padding, g.stride, g.dilation, g.groups, input_size);
}

// Calls f(bytes, size) on everything but the filters that an entry's validity is judged by.
template <typename F>
void visit_values(const ConvBn& c, const F& f) {
  const auto vector = [&](const at::Tensor* t) {
    const auto dtype = t ? t->scalar_type() : at::ScalarType::Undefined;
    f(&dtype, sizeof(dtype));
    if (t == nullptr) return;
    const auto dense = t->contiguous();
    f(dense.const_data_ptr(), static_cast<int64_t>(dense.nbytes()));
  };
  const auto optional = [&](const std::optional<at::Tensor>& t) {
    vector(given(t) ? &*t : nullptr);
  };
  vector(&c.running_mean);
  vector(&c.running_var);
  optional(c.bn_weight);
  optional(c.bn_bias);
  optional(c.bias);
}

struct Pack {
  ConvAlgorithm algorithm;
  Size input_size;    // of oneDNN's packs; the project's own fit any
  at::Tensor weight;  // undefined until oneDNN's size comes a second time

  bool is_for(ConvAlgorithm other, const Size& size) const {
    return algorithm == other && (other != ConvAlgorithm::kOneDnn || input_size == size);
  }
};

// The storage stands for the weight: a weak reference to the tensor would forbid swap_tensors().
const c10::StorageImpl* storage_of(const at::Tensor& t) {
  return t.storage().unsafeGetStorageImpl();
}

struct Entry {
  c10::weak_intrusive_ptr<c10::StorageImpl> owner;
  const void* address;
  std::vector<int64_t> sizes, strides;
  std::optional<uint32_t> version;  // inference tensors have none
  const void* running_mean;
  ConvGeometry geometry;
  double eps;
  at::ScalarType dtype, weight_dtype;
  std::string values;
  std::shared_ptr<const FilterSamples> samples;
  at::Tensor dense, bias;  // dense is made when it is asked for, dropped once there is a pack
  std::vector<Pack> packs;

  explicit Entry(const ConvBn& c)
      : owner(c.weight.storage().getWeakStorageImpl()),
        address(c.weight.const_data_ptr()),
        sizes(c.weight.sizes().vec()),
        strides(c.weight.strides().vec()),
        version(version_of(c.weight)),
        running_mean(c.running_mean.const_data_ptr()),
        geometry(c.geometry),
        eps(c.eps),
        dtype(c.dtype),
        weight_dtype(c.weight.scalar_type()),
        samples(std::make_shared<FilterSamples>(c.weight)),
        bias(Fold(c).bias()) {
    visit_values(c, [&](const void* p, int64_t n) {
      values.append(static_cast<const char*>(p), static_cast<size_t>(n));
    });
  }

  static std::optional<uint32_t> version_of(const at::Tensor& t) {
    return t.is_inference() ? std::nullopt : std::optional<uint32_t>(t._version());
  }

  bool of_this_weight(const ConvBn& c) const {
    return address == c.weight.const_data_ptr() && version == version_of(c.weight) &&
           weight_dtype == c.weight.scalar_type() && c.weight.sizes() == sizes &&
           c.weight.strides() == strides;
  }

  // Another BN after the same convolution has its own entry; a changed BN replaces its entry.
  bool of_this_site(const ConvBn& c) const {
    return dtype == c.dtype && geometry == c.geometry && eps == c.eps &&
           running_mean == c.running_mean.const_data_ptr();
  }

  bool same_values(const ConvBn& c) const {
    const char* p = values.data();
    const char* const end = p + values.size();
    bool same = true;
    visit_values(c, [&](const void* q, int64_t n) {
      same = same && n <= end - p && std::memcmp(p, q, static_cast<size_t>(n)) == 0;
      p += same ? n : 0;
    });
    return same && p == end;
  }

  int64_t bytes() const {
    int64_t total = static_cast<int64_t>(values.size() + bias.nbytes()) + samples->bytes();
    if (dense.defined()) total += static_cast<int64_t>(dense.nbytes());
    for (const auto& p : packs) {
      if (p.weight.defined()) total += p.weight.numel() * static_cast<int64_t>(p.weight.itemsize());
    }
    return total;
  }
};

class FoldCache {
 public:
  FoldedConv get(const ConvBn& c, const Size& input_size, ConvAlgorithm algorithm) {
    if (!c.weight.is_non_overlapping_and_dense()) return unkept(c, algorithm);
    std::unique_lock lock(mutex_);
    auto entry = find(c, algorithm);
    if (entry == nullptr) {
      lock.unlock();  // folding takes a while, and others need not wait
      entry = std::make_shared<Entry>(c);
      lock.lock();
      add_entry(c, entry);
    }
    if (algorithm == ConvAlgorithm::kAten) {
      if (!entry->dense.defined()) entry->dense = Fold(c).dense();
      return {entry->dense, entry->bias, nullptr};
    }
    const auto* known = find_pack(*entry, algorithm, input_size);
    if (known != nullptr && known->weight.defined()) {
      return {known->weight, entry->bias, entry->samples};
    }
    const bool wait = algorithm == ConvAlgorithm::kOneDnn && known == nullptr;
    if (known == nullptr) add_pack(*entry, algorithm, input_size);
    auto dense = entry->dense;
    lock.unlock();
    if (!dense.defined() && !is_own(algorithm)) dense = Fold(c).dense();
    if (wait) {
      lock.lock();
      entry->dense = dense;
      return {dense, entry->bias, nullptr};
    }
    const auto made = is_own(algorithm) ? Fold(c).packed(algorithm)
                                        : pack_for_onednn(dense, c.geometry, input_size);
    lock.lock();
    if (auto* pack = find_pack(*entry, algorithm, input_size)) {
      pack->weight = made;
      entry->dense = at::Tensor();
    }
    return {made, entry->bias, entry->samples};
  }

  void forget(const ConvBn& c) {
    const std::lock_guard lock(mutex_);
    const auto slot = entries_.find(storage_of(c.weight));
    if (slot == entries_.end()) return;
    std::erase_if(slot->second, [&](const auto& e) { return e->of_this_site(c); });
  }

  FoldCacheInfo info() {
    const std::lock_guard lock(mutex_);
    FoldCacheInfo total{0, 0};
    for (const auto& [_, entries] : entries_) {
      for (const auto& entry : entries) {
        if (entry->owner.expired()) continue;
        ++total.entries;
        total.bytes += entry->bytes();
      }
    }
    return total;
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    entries_.clear();
  }

 private:
  using Entries = std::vector<std::shared_ptr<Entry>>;

  // The valid entry of c; those that turn out stale are dropped. The lock is held.
  std::shared_ptr<Entry> find(const ConvBn& c, ConvAlgorithm algorithm) {
    const auto slot = entries_.find(storage_of(c.weight));
    if (slot == entries_.end()) return nullptr;
    auto& entries = slot->second;
    std::erase_if(entries, [&](const auto& e) { return !e->of_this_weight(c); });
    const auto it = std::find_if(entries.begin(), entries.end(),
                                 [&](const auto& e) { return e->of_this_site(c); });
    if (it == entries.end()) return nullptr;
    const bool same_filters = is_own(algorithm) || (*it)->samples->match(c.weight);
    if (same_filters && (*it)->same_values(c)) return *it;
    entries.erase(it);
    return nullptr;
  }

  // Folded for this call only.
  static FoldedConv unkept(const ConvBn& c, ConvAlgorithm algorithm) {
    const Fold fold(c);
    return {is_own(algorithm) ? fold.packed(algorithm) : fold.dense(), fold.bias(), nullptr};
  }

  void add_entry(const ConvBn& c, const std::shared_ptr<Entry>& entry) {
    sweep();
    auto& entries = entries_[storage_of(c.weight)];
    // Another thread may have been faster: then there are two for a while, and either is right.
    if (entries.size() == kEntries) entries.erase(entries.begin());
    entries.push_back(entry);
  }

  static Pack* find_pack(Entry& entry, ConvAlgorithm algorithm, const Size& input_size) {
    const auto it = std::find_if(entry.packs.begin(), entry.packs.end(),
                                 [&](const Pack& p) { return p.is_for(algorithm, input_size); });
    return it == entry.packs.end() ? nullptr : &*it;
  }

  // Remembers an algorithm and a size. One that was seen only once makes room, else the oldest.
  static void add_pack(Entry& entry, ConvAlgorithm algorithm, const Size& input_size) {
    auto& packs = entry.packs;
    if (packs.size() == kPacks) {
      const auto once = std::find_if(packs.begin(), packs.end(),
                                     [](const Pack& p) { return !p.weight.defined(); });
      packs.erase(once == packs.end() ? packs.begin() : once);
    }
    packs.push_back({algorithm, input_size, at::Tensor()});
  }

  void sweep() {
    for (auto slot = entries_.begin(); slot != entries_.end();) {
      std::erase_if(slot->second, [](const auto& e) { return e->owner.expired(); });
      slot = slot->second.empty() ? entries_.erase(slot) : std::next(slot);
    }
  }

  std::mutex mutex_;
  std::unordered_map<const c10::StorageImpl*, Entries> entries_;
};

FoldCache& cache() {
  static auto* const instance = new FoldCache;  // outlives every static destructor
  return *instance;
}

}  // namespace

FoldedConv folded_conv(const ConvBn& c, at::IntArrayRef input_size, ConvAlgorithm algorithm) {
  return cache().get(c, {input_size[0], input_size[1], input_size[2], input_size[3]}, algorithm);
}

void forget_folded(const ConvBn& c) { cache().forget(c); }

FoldCacheInfo fold_cache_info() { return cache().info(); }

void clear_fold_cache() { cache().clear(); }

}  // namespace fastres::cpu
